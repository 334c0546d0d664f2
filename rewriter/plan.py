"""A plan: what will be done, site by site. Plain JSON, editable by hand, replayable."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
    field_validator,
)

from rewriter import targets
from rewriter.atomic import write_file
from rewriter.documents import Document, explain, parse, read_text
from rewriter.errors import UsageError
from rewriter.ir.mlp import MlpSite
from rewriter.ir.site import AttentionSite

PLAN_VERSION = 1
Status = Literal["planned", "refused", "done"]
_NON_FINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Decision(_Strict):
    """What happens to one site.

    Attributes:
        fqn: owner module of the site.
        index: position of the site among all sites of the model.
        target: mixer name; `keep` is the exact identity.
        options: options of the mixer.
        status: planned, refused (then `reason` says why and the site stays untouched), done.
        tier: exact, approximate or distilled.
        site: the matched facts (`to_json` of the site), so that a replay can check them.
        rule: which rule of the policy decided, for people.
    """

    fqn: str
    index: int
    target: str
    options: dict[str, Any] = Field(default_factory=dict)
    status: Status = "planned"
    tier: Literal["exact", "approximate", "distilled"] = "exact"
    reason: str | None = None
    rule: str | None = None
    site: dict[str, Any] = Field(default_factory=dict)

    @field_validator("site", mode="before")
    @classmethod
    def _restore_non_finite(cls, value: Any) -> Any:
        return _map_leaves(value, lambda leaf: _NON_FINITE.get(leaf, leaf))

    @field_serializer("site", when_used="json")
    def _spell_non_finite(self, value: dict[str, Any]) -> Any:
        # a mask fill is often -inf, which strict JSON has no number for
        return _map_leaves(value, _spelled)


class LinearLayer(_Strict):
    """What happens to one linear layer outside the mixers.

    Attributes:
        fqn: the module that is the layer.
        weight, bias: names of its parameters.
        transposed: the weight is stored as (in, out).
        status, reason: as of a `Decision`.
        error: largest difference of outputs and gradients, relative to the largest value.
        gains: measured speed-up by number of rows, where there is one.
    """

    fqn: str
    weight: str = "weight"
    bias: str | None = None
    transposed: bool = False
    status: Status = "planned"
    reason: str | None = None
    error: float = 0.0
    gains: dict[str, float] = Field(default_factory=dict)


class FusedModule(_Strict):
    """A module that computes one region by one generated kernel.

    Attributes:
        fqn: the module.
        kind: 'gated' for a gated MLP block, 'norm' for a normalisation.
        facts: what its kernel needs to know: the block (`to_json` of an `MlpSite`), or the form of
            the norm and the names of its parameters.
        status, reason: as of a `Decision`.
        error: largest difference of outputs, relative to the largest value.
        gains: measured speed-up by number of rows.
    """

    fqn: str
    kind: Literal["gated", "norm"]
    facts: dict[str, Any] = Field(default_factory=dict)
    status: Status = "planned"
    reason: str | None = None
    error: float = 0.0
    gains: dict[str, float] = Field(default_factory=dict)


class PackedLayer(_Strict):
    """A layer that leaves padding out of its computation.

    Attributes:
        fqn: the module; its attention is at `site`.
        site: path of the module that owns the attention, inside or equal to `fqn`.
        tokens: paths of its tensor inputs with a (batch, token, ...) shape, dotted.
        masks: paths of the mask inputs of its attention.
        status, reason: as of a `Decision`.
        error: largest difference at real tokens, relative to the largest value.
    """

    fqn: str
    site: str
    tokens: list[str] = Field(default_factory=list)
    masks: list[str] = Field(default_factory=list)
    status: Status = "planned"
    reason: str | None = None
    error: float = 0.0


class Plan(_Strict):
    """All decisions of a rewrite, with the misses that were reported.

    Attributes:
        version: format of this document.
        policy: name of the policy it came from, for people.
        decisions: one per site, in the order the sites run.
        linears: linear layers that run on faster code, and those left alone with the reason.
        fused: modules that run as one kernel, and those left alone with the reason.
        packed: layers that leave padding out, and those that do not with the reason.
        mlps: one per MLP block that a rule of the policy selects; all others stay as they are.
        misses: near misses as text.
        tool: version of this package that wrote it.
    """

    version: int = PLAN_VERSION
    policy: str = ""
    tool: str = ""
    decisions: list[Decision] = Field(default_factory=list)
    linears: list[LinearLayer] = Field(default_factory=list)
    fused: list[FusedModule] = Field(default_factory=list)
    packed: list[PackedLayer] = Field(default_factory=list)
    mlps: list[Decision] = Field(default_factory=list)
    misses: list[str] = Field(default_factory=list)

    def carried_out(self) -> Plan:
        """The plan with everything that was not refused marked as done."""
        done = {"status": "done"}
        return self.model_copy(
            update={
                name: [
                    x if x.status == "refused" else x.model_copy(update=done)
                    for x in getattr(self, name)
                ]
                for name in ("decisions", "linears", "fused", "packed", "mlps")
            }
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values that strict JSON can hold; `from_json` restores an equal plan."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, data: str | Mapping[str, Any], source: str = "plan") -> Plan:
        """Read a plan from JSON text or from the values of `to_json`.

        Args:
            source: name of the file for messages.

        Raises:
            UsageError: not a plan, written by a newer version, an unknown mixer or an option it
                does not have; the message points at the place.
        """
        if isinstance(data, str):
            document = Document(source, _load_json(data, source))
        else:
            document = Document(source, dict(data))
        try:
            return cls._validated(document)
        except UsageError:
            if not isinstance(data, str):
                raise
            # JSON is YAML, whose node tree knows lines; slow, so only for the error message
            return cls._validated(parse(data, source))

    @classmethod
    def _validated(cls, document: Document) -> Plan:
        data = document.data
        if not isinstance(data, Mapping):
            raise UsageError(f"{document.where(())}: a plan is a JSON object with 'decisions'")
        version = data.get("version", PLAN_VERSION)
        if isinstance(version, int) and version > PLAN_VERSION:
            raise UsageError(
                f"{document.where(('version',))}: this plan has format {version}, written by a "
                f"newer version (this one reads up to {PLAN_VERSION}); upgrade attention-rewriter"
            )
        try:
            plan = cls.model_validate(data)
        except ValidationError as error:
            raise explain(error, document, cls) from None
        known: dict[str, targets.Found | targets.TargetProblem] = {}  # most sites are alike
        for name, resolve in (("decisions", targets.resolve), ("mlps", targets.resolve_channel)):
            for number, decision in enumerate(getattr(plan, name)):
                key = json.dumps([name, decision.target, decision.options], default=str)
                if key not in known:
                    known[key] = resolve(decision.target, decision.options)
                problem = known[key]
                if isinstance(problem, targets.TargetProblem):
                    path = ("target",) if problem.location == ("use",) else problem.location
                    place = document.where((name, number, *path), key=problem.at_key)
                    raise UsageError(f"{place}: {problem.message}")
        return plan

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, atomically.

        Raises:
            OutputError: the file cannot be written.
        """
        text = json.dumps(self.to_json(), indent=2, allow_nan=False)
        write_file(Path(path), (text + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file; raises UsageError as `from_json` does."""
        return cls.from_json(read_text(Path(path), "plan"), str(path))

    def check_mlps(self, sites: Sequence[MlpSite]) -> None:
        """Make sure that the blocks of `mlps` are those of the model.

        Raises:
            UsageError: a block is missing or differs.
        """
        found = {site.index: site for site in sites}
        for decision in self.mlps:
            site = found.get(decision.index)
            if site is None or site.fqn != decision.fqn:
                raise UsageError(
                    f"the plan decides MLP block {decision.index} ('{decision.fqn}'), which the "
                    "model does not have; was it made for another architecture?"
                )
            if decision.site and MlpSite.from_json(decision.site).core_hash() != site.core_hash():
                raise UsageError(
                    f"MLP block {site.index} ('{site.fqn}') differs from the plan; make a new "
                    "plan for this model"
                )

    def check_against(self, sites: Sequence[AttentionSite]) -> None:
        """Make sure that the plan speaks about exactly these sites.

        Decisions without facts (written by hand) are checked by module path and position only.

        Raises:
            UsageError: the first site that is missing, extra or differs, and how.
        """
        decisions = {decision.index: decision for decision in self.decisions}
        if len(decisions) != len(self.decisions):
            raise UsageError("the plan decides one site twice; keep one decision for each index")
        for site in sites:
            decision = decisions.get(site.index)
            if decision is None:
                raise UsageError(
                    f"the plan has no decision for site {site.index} ('{site.fqn}'); add one with "
                    "the target 'keep' to leave it as it is"
                )
            _check_site(decision, site)
        known = {site.index for site in sites}
        for decision in self.decisions:
            if decision.index not in known:
                raise UsageError(
                    f"the plan decides site {decision.index} ('{decision.fqn}'), but the model has "
                    f"{len(sites)} attention sites; was it made for another architecture?"
                )


def tool_version() -> str:
    """Version of this package, for documents it writes."""
    try:
        return metadata.version("attention-rewriter")
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"


def _check_site(decision: Decision, site: AttentionSite) -> None:
    place = f"site {site.index} of the model"
    if decision.fqn != site.fqn:
        raise UsageError(
            f"{place} is '{site.fqn}', but the plan expects '{decision.fqn}' there; was it made "
            "for another architecture?"
        )
    if not decision.site:
        return
    try:
        planned = AttentionSite.from_json(decision.site).core_facts()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"the facts of site {site.index} in the plan cannot be read ({error!r}); remove its "
            "'site' entry to replay without this check"
        ) from None
    found = site.core_facts()
    for name in sorted(planned.keys() | found.keys()):
        before, now = (_canonical(facts.get(name)) for facts in (planned, found))
        if before != now:
            raise UsageError(
                f"{place} ('{site.fqn}') differs from the plan in '{name}': planned {before}, "
                f"found {now}; make a new plan for this model"
            )


def _canonical(value: Any) -> str:
    return json.dumps(_map_leaves(value, _spelled), sort_keys=True)


def _load_json(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{source}:{error.lineno}:{error.colno}: not valid JSON ({error.msg.lower()})"
        ) from None


def _spelled(leaf: Any) -> Any:
    if isinstance(leaf, float) and not math.isfinite(leaf):
        return "NaN" if math.isnan(leaf) else "Infinity" if leaf > 0 else "-Infinity"
    return leaf


def _map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: _map_leaves(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_leaves(item, change) for item in value]
    return change(value)
