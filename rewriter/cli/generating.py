"""`rewriter generate`: continue a prompt with a plain or a rewritten checkpoint."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rewriter.cli.checkpoints import Checkpoint, Dtype, is_language_model, open_source
from rewriter.cli.session import Json, Session, Threads, Traceback, session
from rewriter.errors import UsageError

if TYPE_CHECKING:
    import torch


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option(help="Text to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 100,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Compute everything anew for each token.")
    ] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the prompt as a user's chat message.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the most likely token, more samples.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    dtype: Dtype = "auto",
    as_json: Json = False,
    threads: Threads = None,
    traceback: Traceback = False,
) -> None:
    """Continue a prompt. The text goes to stdout as it is made."""
    with session(as_json, threads) as out:
        import torch

        source = open_source(checkpoint, dtype)
        with out.working("loading the model"):
            tokenizer = source.tokenizer
            ids = _encode(tokenizer, prompt, chat)
            model = source.model
        if not is_language_model(model):
            raise UsageError(f"{checkpoint} is no language model, so it cannot generate text")
        torch.manual_seed(seed)
        sampling: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            sampling["temperature"] = temperature
        start = time.perf_counter()
        result = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            use_cache=not no_cache,
            streamer=None if as_json else _streamer(tokenizer, out),
            pad_token_id=_pad(tokenizer),
            **sampling,
        )
        seconds = time.perf_counter() - start
        new = result[0, ids.shape[1] :]
        out.result(
            {
                "checkpoint": str(checkpoint),
                "prompt": prompt,
                "text": tokenizer.decode(new, skip_special_tokens=True),
                "prompt_tokens": int(ids.shape[1]),
                "new_tokens": int(new.numel()),
                "seconds": round(seconds, 3),
                "cache": not no_cache,
            }
        )
        if not as_json:
            out.note(f"{new.numel()} tokens in {seconds:.1f} s ({new.numel() / seconds:.1f}/s)")


def _encode(tokenizer: Any, prompt: str, chat: bool) -> torch.Tensor:
    """(1, N) token ids of the prompt.

    Raises:
        UsageError: nothing to start from, or no chat template.
    """
    import torch

    if not chat:
        ids = tokenizer.encode(prompt)
    elif not getattr(tokenizer, "chat_template", None):
        raise UsageError("the tokenizer has no chat template; leave out --chat")
    else:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise UsageError("the prompt has no tokens; give --prompt some text")
    return torch.tensor([ids])


def _pad(tokenizer: Any) -> int:
    """Some token to pad with, so that generation need not warn that it chose one."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(c) for c in candidates if c is not None)


def _streamer(tokenizer: Any, out: Session) -> Any:
    from transformers import TextStreamer

    class Stream(TextStreamer):
        """Writes finished words to the session's stdout."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            out.stdout.write(text + ("\n" if stream_end else ""))
            out.stdout.flush()

    return Stream(tokenizer, skip_prompt=True, skip_special_tokens=True)
