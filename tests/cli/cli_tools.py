"""What the tests of the command line share."""

import json
import random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from rewriter.cli.main import app

SENTENCE = "the boat left harbour at noon and rain came over a quiet town while gulls slept"
TEXT = " ".join(random.Random(0).choices(SENTENCE.split(), k=900))


def run(*args: Any) -> Result:
    """Run a command line in this process, at 80 columns."""
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, [str(a) for a in args])


def run_json(*args: Any) -> Any:
    """The JSON that a successful command writes; stdout must hold nothing else."""
    out = run(*args, "--json")
    assert out.exit_code == 0, out.stderr
    return json.loads(out.stdout)


def failed(out: Result, code: int) -> str:
    """The one error line of a command that failed with `code`."""
    assert out.exit_code == code, (out.exit_code, out.stderr)
    lines = out.stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and lines[-1] == errors[0], out.stderr
    assert "Traceback" not in out.stderr
    return errors[0]


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=258,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=256,
            eos_token_id=257,
            pad_token_id=257,
        )
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)} | {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
