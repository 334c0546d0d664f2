"""A plan: what will be done, site by site. Plain JSON, editable by hand, replayable."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

PLAN_VERSION = 1
Status = Literal["planned", "refused", "done"]


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
        site: the matched facts (`AttentionSite.to_json`), so that a replay can check them.
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


class Plan(_Strict):
    """All decisions of a rewrite, with the misses that were reported.

    Attributes:
        version: format of this document.
        policy: name of the policy it came from, for people.
        decisions: one per site, in the order the sites run.
        misses: near misses as text.
        tool: version of this package that wrote it.
    """

    version: int = PLAN_VERSION
    policy: str = ""
    tool: str = ""
    decisions: list[Decision] = Field(default_factory=list)
    misses: list[str] = Field(default_factory=list)
