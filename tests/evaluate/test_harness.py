"""lm-evaluation-harness on a local task: the share that a known model must get."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rewriter.errors import InputError, UnsupportedError
from rewriter.evaluate import harness

TASK = """
task: letters
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" a", " b"]
doc_to_target: right
metric_list:
  - metric: acc
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    data = tmp_path / "letters.jsonl"
    rows = [{"question": f"q{n}", "right": n % 4 == 0} for n in range(8)]
    rows = [{**row, "right": int(row["right"])} for row in rows]
    data.write_text("\n".join(map(json.dumps, rows)))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "letters.yaml").write_text(TASK.format(data=data))
    return folder


def model_that_likes_a(tokenizer: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    liked = tokenizer.encode("a", add_special_tokens=False)[-1]
    model.lm_head.weight.data[liked] = 1.0
    torch.nn.init.ones_(model.model.embed_tokens.weight)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def tokenizer_of_letters() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<s>", "</s>", " ", *(chr(c) for c in range(48, 123))]
    raw = Tokenizer(models.WordLevel({x: i for i, x in enumerate(letters)}, unk_token=" "))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def test_a_local_task(tasks: Path) -> None:
    pytest.importorskip("lm_eval")
    tokenizer = tokenizer_of_letters()
    found = {m.name: m for m in harness(model_that_likes_a(tokenizer), tokenizer, tasks)}
    accuracy = found["letters: acc"]
    assert accuracy.value == 0.75 and accuracy.samples == 8 and accuracy.better == "high"
    assert accuracy.low < 0.75 < accuracy.high and accuracy.interval == "normal"
    with pytest.raises(InputError, match="no task 'words'; it has letters"):
        harness(model_that_likes_a(tokenizer), tokenizer, tasks, names=("words",))


def test_folders_without_tasks(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(InputError, match="no folder with task files"):
        harness(torch.nn.Linear(1, 1), None, tmp_path)


def test_without_the_package(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UnsupportedError, match=r"attention-rewriter\[eval\]"):
        harness(torch.nn.Linear(1, 1), None, tasks)
