"""What the person wants: rules that give each attention site a mixer. The first match wins."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
    field_validator,
    model_validator,
)

from rewriter import targets
from rewriter.budgets import Budget
from rewriter.documents import Document, Location, did_you_mean, explain, parse, read_text
from rewriter.errors import NoSiteError, UsageError
from rewriter.ir.mlp import MlpSite
from rewriter.ir.site import AttentionSite, NearMiss, PositionKind
from rewriter.plan import Decision, Plan, tool_version

LayerSelector = StrictInt | str
PRESET_FOLDER = Path(__file__).parent / "policies"
_RANGE = re.compile(r"(\d+)\s*-\s*(\d+)")
_SLICE = re.compile(r"(-?\d+)?:(-?\d+)?(?::(-?\d+)?)?")
_WORDS: Mapping[str, slice] = {
    "odd": slice(1, None, 2),
    "even": slice(0, None, 2),
    "first": slice(0, 1),
    "last": slice(-1, None),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rule(_Strict):
    """What some sites become. Every selector that is given has to hold; none selects all sites.

    Attributes:
        use: mixer name; `keep` leaves the site as it is.
        options: options of the mixer.
        site: what the rule speaks about: 'attention' or 'mlp'. Its mixers are of that kind.
        layers: site numbers in running order: integers (negative from the end), inclusive ranges
            '0-3', Python slices '::4', or 'odd', 'even', 'first', 'last'.
        fqn: glob on the path of the owning module ('*' also crosses dots).
        kind: 'causal' or 'bidirectional'.
        position: how positions enter the site.
    """

    use: str
    options: dict[str, Any] = Field(default_factory=dict)
    site: Literal["attention", "mlp"] = "attention"
    layers: tuple[LayerSelector, ...] | None = None
    fqn: str | None = None
    kind: Literal["causal", "bidirectional"] | None = None
    position: PositionKind | None = None

    @field_validator("layers", mode="before")
    @classmethod
    def _as_sequence(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int | str) else value

    @field_validator("layers")
    @classmethod
    def _check_layers(
        cls, value: tuple[LayerSelector, ...] | None
    ) -> tuple[LayerSelector, ...] | None:
        for selector in value or ():
            _check_selector(selector)
        return value

    @model_validator(mode="after")
    def _check_site(self) -> Rule:
        if self.site == "mlp" and (self.kind is not None or self.position is not None):
            raise ValueError("'kind' and 'position' select attention; remove them or 'site: mlp'")
        return self

    def selects(self, site: AttentionSite | MlpSite, count: int) -> bool:
        """Does this rule speak about `site`, one of `count` sites of its sort?"""
        if isinstance(site, MlpSite) != (self.site == "mlp"):
            return False
        return (
            (self.layers is None or any(site.index in chosen(s, count) for s in self.layers))
            and (self.fqn is None or fnmatch.fnmatchcase(site.fqn, self.fqn))
            and (isinstance(site, MlpSite) or self.kind in (None, site.kind))
            and (isinstance(site, MlpSite) or self.position in (None, site.position))
        )

    def describe(self) -> str:
        """'layers 0, 3 & kind causal', or 'all sites'."""
        parts = ["MLP blocks"] if self.site == "mlp" else []
        if self.layers is not None:
            parts.append(f"layers {', '.join(str(s) for s in self.layers)}")
        for name in ("fqn", "kind", "position"):
            if (value := getattr(self, name)) is not None:
                parts.append(f"{name} {value}")
        return " & ".join(parts) or "all sites"


class Policy(_Strict):
    """Rules in order, and the mixer for sites that no rule selects.

    Attributes:
        name: for people and for the plan.
        description: one or two sentences.
        rules: the first one that selects a site decides.
        default: mixer of all other sites.
        minimum_sites: fewer attention sites than this in a model are an error.
        linears: linear layers run on generated code where it is measured to be faster; they stay
            the same function.
        packed: layers of encoders leave padding out of their computation; their outputs at padded
            positions are 0, those at tokens stay the same.
        budget: instead of rules: what may be spent; the plan is then searched and measured.
    """

    name: str = ""
    description: str = ""
    rules: tuple[Rule, ...] = ()
    default: str = "keep"
    minimum_sites: int = Field(default=1, ge=0)
    linears: bool = False
    packed: bool = False
    budget: Budget | None = None

    @model_validator(mode="after")
    def _rules_or_budget(self) -> Policy:
        if self.budget is not None and (self.rules or self.default != "keep"):
            raise ValueError("a budget decides every site: remove 'rules' and 'default', or it")
        return self

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any] | Budget | Policy) -> Policy:
        """A policy from a preset name, a YAML or JSON file, a mapping, a budget, or a policy.

        Raises:
            UsageError: no such preset or file, or the content is not a valid policy; the message
                names file, line and column.
        """
        if isinstance(source, Budget):
            source = cls(name="budget", budget=source)
        if isinstance(source, Policy):
            _check_targets(source, Document("policy", None))
            return source
        if isinstance(source, Mapping):
            return cls._validated(Document("policy", dict(source)))
        if isinstance(source, str) and (preset := _preset_file(source)) is not None:
            source = preset
        elif isinstance(source, str) and not _looks_like_path(source):
            raise UsageError(
                f"there is no preset policy '{source}'{did_you_mean(source, preset_names())} "
                "(or give the path of a YAML file)"
            )
        path = Path(source)
        document = parse(read_text(path, "policy"), str(path))
        policy = cls._validated(document)
        return policy if policy.name else policy.model_copy(update={"name": path.stem})

    @classmethod
    def _validated(cls, document: Document) -> Policy:
        if not isinstance(document.data, Mapping):
            raise UsageError(
                f"{document.where(())}: a policy is a mapping with keys such as 'rules' and "
                f"'default', not a {type(document.data).__name__}"
            )
        try:
            policy = cls.model_validate(document.data)
        except ValidationError as error:
            raise explain(error, document, cls) from None
        _check_targets(policy, document)
        return policy


def presets() -> dict[str, Policy]:
    """All shipped policies by name."""
    return {name: Policy.load(name) for name in preset_names()}


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.yaml"))


def make_plan(
    policy: Policy,
    sites: Sequence[AttentionSite],
    misses: Sequence[NearMiss] = (),
    mlps: Sequence[MlpSite] = (),
) -> Plan:
    """Decide every site. A mixer that cannot serve its site gives a refused decision, not an error.

    Raises:
        NoSiteError: fewer sites than `policy.minimum_sites`.
        UsageError: the policy names a layer or module that the model does not have, an unknown
            mixer, or options that the mixer does not accept.
    """
    resolved = _check_targets(policy, Document("policy", None))
    if policy.budget is not None:
        raise UsageError(
            f"the policy '{policy.name or 'given'}' is a budget, whose plan has to be measured on "
            "text: pass calibration=[token rows] to rewriter.rewrite, or run "
            "'rewriter plan --text FILE' and convert with its plan"
        )
    if len(sites) < policy.minimum_sites:
        raise NoSiteError(_too_few(policy, sites, misses))
    for number, rule in enumerate(policy.rules):
        _check_reach(number, rule, mlps if rule.site == "mlp" else sites)
    return Plan(
        policy=policy.name,
        tool=tool_version(),
        decisions=_agreed([_decide(policy, resolved, s, len(sites)) for s in sites], sites),
        mlps=[d for site in mlps if (d := _decide_mlp(policy, resolved, site, len(mlps)))],
        misses=[miss.describe() for miss in misses],
    )


def chosen(selector: LayerSelector, count: int) -> range:
    """The site numbers that one entry of `layers` stands for, among `count` sites.

    Raises:
        ValueError: the entry has no meaning.
    """
    if isinstance(selector, int):
        index = selector + count if selector < 0 else selector
        return range(index, index + 1)
    text = selector.strip()
    if text in _WORDS:
        return range(count)[_WORDS[text]]
    if re.fullmatch(r"-?\d+", text):
        return chosen(int(text), count)
    if match := _RANGE.fullmatch(text):
        low, high = int(match[1]), int(match[2])
        if low > high:
            raise ValueError(f"the range '{text}' runs backwards; write '{high}-{low}'")
        return range(low, high + 1)
    if match := _SLICE.fullmatch(text):
        parts = [int(part) if part else None for part in match.groups()]
        if parts[2] == 0:
            raise ValueError(f"the step of '{text}' is zero")
        return range(count)[slice(*parts)]
    raise ValueError(
        f"'{selector}' selects no layers{did_you_mean(text, _WORDS)}; write an integer, a range "
        "'0-3', a slice '::4', 'odd', 'even', 'first' or 'last'"
    )


def _check_selector(selector: LayerSelector) -> None:
    chosen(selector, 1)


def _check_targets(policy: Policy, document: Document) -> list[targets.Found]:
    """The target of each rule, and last that of the default."""
    wanted: list[tuple[Location, str, Mapping[str, Any], bool]] = [
        (("rules", i), rule.use, rule.options, rule.site == "mlp" and rule.use != "keep")
        for i, rule in enumerate(policy.rules)
    ]
    for i, choice in enumerate(policy.budget.choices if policy.budget is not None else ()):
        wanted.append((("budget", "choices", i), choice.use, choice.options, False))
    out = []
    for base, name, options, channel in [*wanted, ((), policy.default, {}, False)]:
        target = (targets.resolve_channel if channel else targets.resolve)(name, options)
        if isinstance(target, targets.TargetProblem):
            location = (*base, *target.location) if base else ("default",)
            place = document.where(location, key=target.at_key and bool(base))
            raise UsageError(f"{place}: {target.message}")
        out.append(target)
    return out


def _check_reach(number: int, rule: Rule, sites: Sequence[AttentionSite | MlpSite]) -> None:
    """A layer or module the model does not have is a mistake, not a rule that matches nothing."""
    where = f"rule {number + 1} of the policy"
    for selector in rule.layers or ():
        named = isinstance(selector, int) or _RANGE.fullmatch(selector.strip()) is not None
        beyond = [i for i in chosen(selector, len(sites)) if not 0 <= i < len(sites)]
        if named and beyond:
            raise UsageError(
                f"{where} names layer {selector}, but the model has {len(sites)} "
                f"{_noun(rule)} sites (0 to {len(sites) - 1}); change 'layers'"
            )
    if rule.fqn is not None and sites:
        names = [site.fqn for site in sites]
        if not any(fnmatch.fnmatchcase(name, rule.fqn) for name in names):
            raise UsageError(
                f"{where} selects modules '{rule.fqn}', but no {_noun(rule)} site has such a path; "
                f"the first one is '{names[0]}'"
            )


def _noun(rule: Rule) -> str:
    return "MLP" if rule.site == "mlp" else "attention"


def _decide(
    policy: Policy, resolved: Sequence[targets.Found], site: AttentionSite, count: int
) -> Decision:
    name, target, text = policy.default, resolved[-1], "default"
    for number, rule in enumerate(policy.rules):
        if rule.selects(site, count):
            name, target = rule.use, resolved[number]
            text = f"rule {number + 1} ({rule.describe()})"
            break
    assert isinstance(target, targets.Target)
    reason = target.mixer.refuse(site, target.options)
    return Decision(
        fqn=site.fqn,
        index=site.index,
        target=name,
        options=target.options.model_dump(mode="json"),
        status="planned" if reason is None else "refused",
        tier=target.mixer.info.tier,
        reason=reason,
        rule=text,
        site=site.to_json(),
    )


def _agreed(decisions: list[Decision], sites: Sequence[AttentionSite]) -> list[Decision]:
    """The decisions, with those refused that would treat runs of one module differently."""
    groups: dict[tuple[str, int], list[Decision]] = {}
    for decision, site in zip(decisions, sites, strict=True):
        groups.setdefault((site.fqn, site.slot), []).append(decision)
    refused: dict[int, str] = {}
    for (fqn, _), runs in groups.items():
        if len({(d.target, repr(d.options), d.status) for d in runs}) > 1:
            why = (
                f"'{fqn or 'the model'}' runs {len(runs)} times in one forward pass with the same "
                "weights and cannot become something else in each run: select all of its sites "
                f"({', '.join(str(d.index) for d in runs)}) or none"
            )
            refused.update({d.index: d.reason or why for d in runs})
    return [
        d.model_copy(update={"status": "refused", "reason": refused[d.index]})
        if d.index in refused
        else d
        for d in decisions
    ]


def _decide_mlp(
    policy: Policy, resolved: Sequence[targets.Found], site: MlpSite, count: int
) -> Decision | None:
    """What the first rule for this block says; None leaves it alone."""
    rules = list(enumerate(policy.rules))
    number, rule = next(((n, r) for n, r in rules if r.selects(site, count)), (0, None))
    target = resolved[number]
    if rule is None or not isinstance(target, targets.ChannelTarget):
        return None
    reason = target.mixer.refuse(site, target.options)
    return Decision(
        fqn=site.fqn,
        index=site.index,
        target=rule.use,
        options=target.options.model_dump(mode="json"),
        status="planned" if reason is None else "refused",
        tier=target.mixer.info.tier,
        reason=reason,
        rule=f"rule {number + 1} ({rule.describe()})",
        site=site.to_json(),
    )


def _too_few(policy: Policy, sites: Sequence[AttentionSite], misses: Sequence[NearMiss]) -> str:
    found = "no attention was" if not sites else f"only {len(sites)} attention sites were"
    text = f"{found} found in the model, and the policy needs at least {policy.minimum_sites}"
    if misses:
        return f"{text}; the first near miss: {misses[0].describe()}"
    return f"{text}; nothing in its graph looks like attention, so there is nothing to rewrite"


def _preset_file(name: str) -> Path | None:
    path = PRESET_FOLDER / f"{name}.yaml"
    return path if name in preset_names() else None


def _looks_like_path(text: str) -> bool:
    path = Path(text)
    return path.suffix.lower() in (".yaml", ".yml", ".json") or len(path.parts) > 1 or path.exists()
