"""Makes scipy.safetensors: what scipy.signal gives for the state spaces of s4d.

    pip install scipy safetensors && python tests/mixers/vectors/make_scipy.py

A real state space per channel (one 2 x 2 block a mode) is discretised by scipy's zero-order hold
and simulated by `dlsim`, in float64; nothing of this project is imported.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from scipy.linalg import block_diag
from scipy.signal import cont2discrete, dimpulse, dlsim

QUERY, KEY_VALUE, WIDTH, MODES, BATCH, LENGTH = 4, 2, 8, 5, 2, 70


def main() -> None:
    rng = np.random.default_rng(7)
    given = {
        "log_rate": rng.normal(-0.7, 0.4, (KEY_VALUE, WIDTH, MODES)),
        "frequency": rng.normal(8.0, 6.0, (KEY_VALUE, WIDTH, MODES)),
        "log_step": rng.uniform(np.log(1e-2), np.log(1e-1), (KEY_VALUE, WIDTH)),
        "read": rng.normal(size=(QUERY, WIDTH, MODES, 2)),
        "skip": rng.normal(size=(QUERY, WIDTH)),
        "v": rng.normal(size=(BATCH, KEY_VALUE, LENGTH, WIDTH)),
    }
    given = {name: value.astype(np.float32) for name, value in given.items()}
    exact = {name: value.astype(np.float64) for name, value in given.items()}
    out = np.zeros((BATCH, QUERY, LENGTH, WIDTH))
    impulse = np.zeros((QUERY, WIDTH, LENGTH))
    for head in range(QUERY):
        kv = head // (QUERY // KEY_VALUE)
        for d in range(WIDTH):
            blocks = [
                [[-np.exp(r), -w], [w, -np.exp(r)]]
                for r, w in zip(exact["log_rate"][kv, d], exact["frequency"][kv, d], strict=True)
            ]
            a = block_diag(*blocks)
            b = np.tile([1.0, 0.0], MODES)[:, None]
            c = (2 * exact["read"][head, d] * [1.0, -1.0]).reshape(1, -1)
            skip = np.array([[exact["skip"][head, d]]])
            step = float(np.exp(exact["log_step"][kv, d]))
            # scipy's discrete state is one step older: y_t = C h_t, h_{t+1} = A h_t + B u_t.
            ad, bd, *_ = cont2discrete((a, b, c, skip), step, method="zoh")
            system = (ad, bd, c @ ad, c @ bd + skip, step)
            for row in range(BATCH):
                out[row, head, :, d] = dlsim(system, exact["v"][row, kv, :, d])[1][:, 0]
            impulse[head, d] = dimpulse(system, n=LENGTH)[1][0][:, 0]
    vectors = {**given, "out": out, "impulse": impulse}
    save_file(
        {n: np.ascontiguousarray(v) for n, v in vectors.items()},
        Path(__file__).parent / "scipy.safetensors",
    )


if __name__ == "__main__":
    main()
