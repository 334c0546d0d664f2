"""llama.cpp in a process of its own, for `against_llama_cpp.py`: one JSON request a line.

    {"open": PATH, "room": N, "threads": N} -> {"version": TEXT}
    {"fill": [TOKEN, ...]}                  -> {}       (tokens it already has are not run again)
    {"round": N}                            -> {"seconds": [...]}  (between greedy tokens)

Its OpenMP runtime and torch's do not live in one process.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

try:
    import llama_cpp
except ImportError:
    raise SystemExit(
        "this comparison needs llama.cpp, which is no part of this package: "
        "pip install llama-cpp-python"
    ) from None


def opened(request: dict[str, Any]) -> Any:
    return llama_cpp.Llama(
        request["open"], n_ctx=request["room"], n_threads=request["threads"],
        n_threads_batch=request["threads"], n_batch=1024, n_ubatch=512, verbose=False,
    )  # fmt: skip


def decoded(model: Any, new: int) -> list[float]:
    times = []
    for _ in range(new):
        began = time.perf_counter()
        model.eval([model.sample(temp=0.0)])
        times.append(time.perf_counter() - began)
    return times[1:]


def main() -> None:
    model: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if "open" in request:
            model = opened(request)
            answer = {"version": llama_cpp.__version__}
        elif "fill" in request:
            model.eval(request["fill"][model.n_tokens :])
        else:
            answer = {"seconds": decoded(model, request["round"])}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
