"""Contract 7 on a real rewrite: save, load, same outputs and same generated tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from checkpoint_stubs import tiny_llama, tokens

import rewriter
from rewriter.checkpoint import open_checkpoint, save
from rewriter.checkpoint.keys import new_keys, reverse_state_dict

POLICY = {  # a window shorter than the input, so that the new parameters matter
    "rules": [
        {"layers": 0, "use": "keep"},
        {"use": "hedgehog_window", "options": {"window": 3, "sinks": 1}},
    ]
}


def test_rewritten_model_survives_the_disk(tmp_path: Path) -> None:
    original = tiny_llama()
    model = rewriter.rewrite(original, POLICY, verify="none")
    plan = rewriter.plan_of(model)
    assert [d.target for d in plan.decisions] == ["keep", "hedgehog_window"]
    fresh = model(tokens()).logits
    with torch.no_grad():  # as if trained: fresh mixers must not pass this test
        for key in new_keys(model):
            model.get_parameter(key).add_(0.25)
    assert not torch.equal(model(tokens()).logits, fresh)
    assert list(reverse_state_dict(model)) == list(original.state_dict())
    save(model, tmp_path / "out", plan)
    again = open_checkpoint(tmp_path / "out").model
    # Both decode by the compiled step: a subclass of the original's class, made in place.
    assert type(again) is type(model) and isinstance(again, type(original))
    assert list(again.state_dict()) == list(model.state_dict())
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    wanted = model.generate(tokens(1), max_new_tokens=4, do_sample=False)
    assert torch.equal(again.generate(tokens(1), max_new_tokens=4, do_sample=False), wanted)
