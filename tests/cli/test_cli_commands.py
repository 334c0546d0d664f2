"""Every command on a tiny random checkpoint, from end to end."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import byte_tokenizer, failed, run, run_json, tiny_llama
from transformers import BertConfig, BertForMaskedLM

from rewriter import api
from rewriter.checkpoint import load
from rewriter.distill import LiveProgress, Progress
from rewriter.ir.contract import judged
from rewriter.ir.site import NearMiss, Source

MISS = NearMiss("mask", "it depends on data", Source("where", "model.head", "/a/b.py", 7))


def test_inspect_shows_every_site(tiny: Path) -> None:
    out = run("inspect", tiny)
    assert out.exit_code == 0
    assert out.stderr == ""
    lines = out.stdout.splitlines()
    assert lines[2].split()[:4] == ["0", "model.layers.0.self_attn", "4/2", "x"]
    assert "causal, padding" in lines[3]
    assert "projections  q_proj, k_proj, v_proj, o_proj" in lines
    assert lines[-1] == "2 attention sites in 2 modules (2 causal), 0 near misses"
    assert "\x1b" not in out.stdout


@pytest.mark.usefixtures("known")
def test_inspect_as_json(tiny: Path) -> None:
    data = run_json("inspect", tiny)
    assert [site["fqn"] for site in data["sites"]] == [
        f"model.layers.{i}.self_attn" for i in (0, 1)
    ]
    assert data["sites"][0]["heads"] == {
        "query": 4,
        "key_value": 2,
        "key_dim": 16,
        "value_dim": 16,
    }
    assert data["misses"] == []


@pytest.mark.usefixtures("known")
def test_inspect_why(tiny: Path) -> None:
    out = run("inspect", tiny, "--why", "model.layers.1.self_attn")
    assert "site 1: model.layers.1.self_attn - understood" in out.stdout
    assert re.search(r"^keep +can serve it$", out.stdout, re.MULTILINE)
    data = run_json("inspect", tiny, "--why", "model.layers.1.self_attn.q_proj")
    assert [site["index"] for site in data["sites"]] == [1]
    assert data["sites"][0]["mixers"]["sink_window"] is None
    assert "looks like attention" in run("inspect", tiny, "--why", "model.layers.0.mlp").stdout
    line = failed(run("inspect", tiny, "--why", "model.layers.1.self_atn"), 2)
    assert "did you mean 'model.layers.1.self_attn'" in line


def test_inspect_without_any_site_is_4(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "inspect", lambda _: api.Inspection((), (MISS,)))
    out = run("inspect", tiny)
    assert "it depends on data" in failed(out, 4)
    assert "1 near miss" in out.stdout


@pytest.mark.usefixtures("known")
def test_plan_is_a_dry_run_that_can_be_edited_and_replayed(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    out = run("plan", tiny, "--policy", "hybrid", "--out", file)
    assert out.exit_code == 0, out.stderr
    assert "1  model.layers.1.self_attn  hedgehog_window  distilled  planned" in out.stdout
    data = json.loads(file.read_text())
    data["decisions"][1].update(target="sink_window", options={"window": 9}, tier="approximate")
    file.write_text(json.dumps(data))
    made = run_json("convert", tiny, "--plan", file, "--out", tmp_path / "o", "--verify", "none")
    assert [d["target"] for d in made["plan"]["decisions"]] == ["keep", "sink_window"]
    assert made["passed"] is True and made["contracts"] == []
    saved = run_json("inspect", tmp_path / "o")
    assert saved["plan"]["decisions"][1]["options"]["window"] == 9


@pytest.mark.usefixtures("known")
def test_plan_as_json(tiny: Path) -> None:
    data = run_json("plan", tiny, "--policy", "sink-window")
    assert [d["status"] for d in data["decisions"]] == ["planned", "planned"]


@pytest.mark.usefixtures("known")
def test_convert_prints_plan_contracts_and_place(tiny: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    out = run("convert", tiny, "--policy", "identity", "--out", target, "--verify", "quick")
    assert out.exit_code == 0, out.stderr
    assert out.stderr == ""
    assert "2 x keep no options; exact; sites 0-1" in out.stdout
    assert "0 failed" not in out.stdout
    assert "identity plan equals" in out.stdout
    assert out.stdout.rstrip().endswith(f"saved to {target}") or "saved to" in out.stdout
    assert (target / "tokenizer.json").exists()
    refused = failed(run("convert", tiny, "--policy", "identity", "--out", target), 6)
    assert "--overwrite" in refused
    rewritten = failed(run("convert", target, "--policy", "identity", "--out", tmp_path / "2"), 2)
    assert "rewritten already" in rewritten


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 2, "--policy"),
        (("--policy", "hybird"), 2, "did you mean 'hybrid'"),
        (("--policy", "hybrid", "--plan", "x.json"), 2, "not both"),
        (("--plan", "/no/such/plan.json"), 2, "does not exist"),
        (("--policy", "hybrid", "--dtype", "int3"), 2, "int3"),
    ],
)
def test_convert_refuses_before_it_works(
    words: tuple[str, ...], code: int, said: str, tiny: Path, tmp_path: Path
) -> None:
    assert said in failed(run("convert", tiny, "--out", tmp_path / "o", *words), code)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("known")
def test_a_failed_contract_is_5_and_leaves_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = judged(4, "later tokens change nothing", "model", 0.5, 1e-6)
    monkeypatch.setattr(api, "run_contracts", lambda *_: [broken])
    words = ("convert", tiny, "--policy", "sink-window", "--out", tmp_path / "o")
    out = run(*words, "--json")
    assert "contract 4" in failed(out, 5)
    data = json.loads(out.stdout)
    assert data["error"]["exit_code"] == 5
    assert data["report"]["contracts"][0]["outcome"] == "fail"
    assert list(tmp_path.iterdir()) == []


def test_near_misses_warn_on_stderr_or_stop(
    tiny: Path, tmp_path: Path, found: api.Inspection, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_miss = api.Inspection(found.sites, (MISS,))
    monkeypatch.setattr(api, "find", lambda *_: with_miss)
    words = ("convert", tiny, "--policy", "sink-window", "--out", tmp_path / "o")
    line = failed(run(*words, "--on-miss", "error"), 4)
    assert "it depends on data" in line
    out = run(*words, "--verify", "none")
    assert out.exit_code == 0
    assert out.stderr.startswith("warning: not rewritten: mask: it depends on data")


def test_generate_is_the_same_with_and_without_cache(tiny: Path, converted: Path) -> None:
    for checkpoint in (tiny, converted):
        words = ("generate", checkpoint, "--prompt", "the boat left", "--max-new-tokens", "6")
        cached, plain = run_json(*words), run_json(*words, "--no-cache")
        assert cached["new_tokens"] == 6
        assert cached["text"] == plain["text"]
    out = run(*words)
    assert out.stdout.rstrip("\n") == cached["text"].rstrip("\n")
    assert "tokens in" in out.stderr
    assert "chat template" in failed(run(*words, "--chat"), 2)


def test_generate_in_a_process_of_its_own(converted: Path) -> None:
    """Nothing that another command imported is there."""
    words = ("generate", str(converted), "--prompt", "the boat left", "--max-new-tokens", "3")
    done = subprocess.run(
        [sys.executable, "-m", "rewriter", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == run(*words).stdout


def test_a_missing_tokenizer_is_3(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "bare")
    line = failed(run("generate", tmp_path / "bare", "--prompt", "x"), 3)
    assert "tokenizer" in line


def test_eval_beside_the_teacher(tiny: Path, converted: Path, text: Path) -> None:
    words = ["eval", converted, "--teacher", tiny, "--text", text, "--length", 128, "--gap", 60]
    words += ["--blocks", 2, "--metrics", "perplexity,copy,teacher"]
    data = run_json(*words)
    assert set(data["models"]) == {"teacher", "student"}
    assert set(data["models"]["student"]) >= {"perplexity", "copy perplexity", "KL to teacher"}
    assert set(data["ablation"]["without"]) == {"nothing", "window", "linear"}
    out = run(*words, "--no-branches")
    assert "top-1 agreement" in out.stdout
    assert "switched off" not in out.stdout
    assert max(map(len, out.stdout.splitlines())) <= 80
    assert "positions" in failed(run("eval", tiny, "--text", text), 2)
    assert "--text" in failed(run("eval", tiny), 2)
    assert "taste" in failed(run("eval", tiny, "--text", text, "--metrics", "taste"), 2)


def test_eval_with_columns_beside(tiny: Path, converted: Path, text: Path) -> None:
    words = ["eval", converted, "--teacher", tiny, "--beside", converted, "--text", text]
    words += ["--length", 128, "--blocks", 1, "--no-branches", "--metrics", "lists,speed"]
    tables = run_json(*words)
    assert list(tables["models"]) == ["teacher", "converted", "student"]
    for row in tables["models"].values():
        assert row["nested lists"]["samples"] == 8
        assert row["cache at 496 tokens, MiB"]["value"] > 0
    assert "lists of 256 tokens" in tables["notes"][0]


def test_eval_of_an_encoder_with_a_language_head(text: Path, tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.save_pretrained(tmp_path)
    words = ("eval", tmp_path, "--teacher", tmp_path, "--text", text, "--blocks", 2)
    models = run_json(*words)["models"]
    assert models["teacher"] == models["student"]
    found = models["student"]["masked-token accuracy"]
    assert found["tokens"] == 2 * 19 and 0 <= found["low"] <= found["high"] <= 1


def test_eval_refuses_a_teacher_that_reads_otherwise(
    tiny: Path, text: Path, tmp_path: Path
) -> None:
    other = byte_tokenizer()
    other.add_tokens(["boat"])
    tiny_llama().save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    words = ("eval", tiny, "--teacher", tmp_path, "--text", text, "--length", 64)
    assert "tokenizers" in failed(run(*words), 3)


@pytest.mark.parametrize("stored", [False, True])
def test_distill_survives_an_interruption(
    stored: bool,
    tiny: Path,
    converted: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tmp_path / "config.yaml"
    stage = {"steps": 3, "lr": 0.01}
    settings = {
        "length": 64,
        "dtype": "float32",
        "checkpoint_every": 1,
        "layers": {**stage, "stored": stored},
        "logits": {**stage, "train": "core"},
    }
    config.write_text(json.dumps(settings))

    def words(out: str) -> tuple[Any, ...]:
        base = ("distill", tiny, converted, "--text", text, "--config", config)
        return (*base, "--out", tmp_path / out)

    whole = run_json(*words("whole"))
    assert [s["name"] for s in whole["stages"]] == ["layers", "logits"]
    assert not (tmp_path / "whole.distill").exists()

    def stop(self: LiveProgress, progress: Progress) -> None:
        if progress.stage == "layers" and progress.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(LiveProgress, "update", stop)
        out = run(*words("cut"))
    assert out.exit_code == 130
    assert "--resume" in out.stderr
    assert not (tmp_path / "cut").exists()
    assert "--resume" in failed(run(*words("cut")), 2)
    resumed = run(*words("cut"), "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert "resuming stage 'layers'" in resumed.stderr
    assert "layers" in resumed.stdout

    a, b = (load(tmp_path / name).state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    before = load(converted).state_dict()
    assert any(not torch.equal(before[key], a[key]) for key in a if ".core." in key)


def test_distill_refuses_what_cannot_work(
    tiny: Path, converted: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "o"
    swapped = run("distill", converted, tiny, "--text", text, "--out", out, "--steps", 2)
    assert "rewritten already" in failed(swapped, 2)
    plain = run("distill", tiny, tiny, "--text", text, "--out", out, "--steps", 2)
    assert "not a rewritten checkpoint" in failed(plain, 2)
    words = ("--text", text, "--out", out, "--steps", 2, "--length", 16)
    assert "--length 28" in failed(run("distill", tiny, converted, *words), 2)
    gone = run("distill", tiny, converted, "--text", tmp_path / "no.txt", "--out", out)
    assert "no.txt" in failed(gone, 3)


def test_recipes(tiny: Path, tmp_path: Path) -> None:
    out = run("recipes").stdout
    listed = {r["name"]: r for r in run_json("recipes")["recipes"]}
    names = "demo hedgehog lit lolcats mambainllama minilm mohawk radlads"
    assert set(names.split()) == set(listed)
    assert all(name in out for name in listed)
    assert "attention: cross_entropy" in run("recipes", "hedgehog").stdout
    assert run_json("recipes", "hedgehog") == listed["hedgehog"]
    assert "did you mean 'hedgehog'" in failed(run("recipes", "hedghog"), 2)
    words = ("--text", tmp_path / "no.txt", "--out", tmp_path / "out", "--config", "lolcat")
    assert "no recipe 'lolcat'" in failed(run("distill", tiny, tiny, *words), 2)


def test_mixers() -> None:
    out = run("mixers")
    assert {"keep", "sink_window", "hedgehog", "hedgehog_window"} <= {
        line.split()[0] for line in out.stdout.splitlines() if line.strip()
    }
    listed = {m["name"]: m for m in run_json("mixers")["mixers"]}
    assert listed["keep"]["cost"]["growth"] == "N^2"
    assert listed["keep"]["cost"]["share_of_softmax"] == 1.0
    assert listed["keep"]["state"]["bytes_per_token"] == 4 * 3 * (64 + 64)
    assert listed["hedgehog"]["cost"]["growth"] == "N"
    assert listed["hedgehog"]["state"]["bytes_per_token"] == 0
    one = run("mixers", "sink_window").stdout
    assert "tokens in the window" in one
    assert "i - j < window" in one
    assert "sink_window" in failed(run("mixers", "sink_windw"), 2)
    for name in ("lowrank_mlp", "monarch_mlp"):
        assert name in out.stdout
        blocks = {m["name"]: m for m in run_json("mixers")["channel_mixers"]}
        assert 0.4 < blocks[name]["cost"]["share_of_dense"] <= 0.5
        assert all(o["description"] for o in blocks[name]["options"])
        shown = run("mixers", name).stdout
        assert "share of the dense matrix" in " ".join(shown.split())
        assert blocks[name]["source"].split()[0] in shown


def test_in_a_process_of_its_own(tiny: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rewriter", "inspect", str(tiny), "--json", "--threads", "1"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(json.loads(done.stdout)["sites"]) == 2
    assert done.stderr == ""


def test_profile_shows_named_devices_and_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run("profile", "--device", "h100-sxm-80gb")
    assert out.exit_code == 0 and "NVIDIA H100" in out.stdout
    assert "a100-sxm-80gb" in failed(run("profile", "--device", "h900"), 2)
    assert "--clock" in failed(run("profile", "--clock", "sun"), 2)

    from rewriter.planner import profiling

    small = profiling.ProfileOptions(
        rows=(1, 4), matrices=((16, 16),), mixers=(("fused", {}),), heads=((2, 1, 16, 16),),
        hidden=32, prefill=(8,), decode=(8,), seconds=0.0, pool=4096,
    )  # fmt: skip
    real = profiling.profile
    monkeypatch.setattr(profiling, "profile", lambda options, note: real(small, note))
    data = run_json("profile", "--out", tmp_path / "p.json")
    assert data == json.loads((tmp_path / "p.json").read_text())
    assert "cores, ms a token" in run("profile", "--device", tmp_path / "p.json").stdout


@pytest.mark.usefixtures("known")
def test_plan_under_a_budget(tiny: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "budget.yaml"
    file.write_text("budget: {memory: 0.6x, context: 4096, steps: 1, trials: 0, draws: 1}\n")
    plan = tmp_path / "plan.json"
    out = run("plan", tiny, "--policy", file, "--text", text, "--out", plan)
    assert out.exit_code == 0, out.stderr
    assert "at most 0.6 x that of the exact model" in out.stdout
    assert "sums of single harms" in out.stdout
    targets = [d["target"] for d in json.loads(plan.read_text())["decisions"]]
    assert set(targets) <= {"fused", "sink_window"}
    assert targets.count("fused") <= 1  # two full caches are more than 0.6 of two
    assert "--text" in failed(run("plan", tiny, "--memory", "0.6x"), 2)
    refused = failed(run("convert", tiny, "--policy", file, "--out", tmp_path / "o"), 2)
    assert "rewriter plan --policy" in refused
    assert "not both" in failed(run("plan", tiny, "--policy", "hybrid", "--memory", "1 MiB"), 2)
    assert "--latency" in failed(run("plan", tiny), 2)
    assert "is no memory" in failed(run("plan", tiny, "--memory", "lots", "--text", text), 2)


@pytest.mark.usefixtures("known")
def test_sensitivity(tiny: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    out = run("sensitivity", tiny, "--text", text, "--rows", 1, "--out", file, "--heads")
    assert out.exit_code == 0, out.stderr
    assert "sink_window window=64 sinks=4: nats a token" in out.stdout
    assert len(json.loads(file.read_text())["sites"]) == 2
    assert "--text" in failed(run("sensitivity", tiny), 2)
    wrong = run("sensitivity", tiny, "--text", text, "--candidate", "sink_window:windw=4")
    assert "did you mean" in failed(wrong, 2)
