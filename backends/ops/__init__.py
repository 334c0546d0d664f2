"""The kernel specs as `torch.library` custom ops: traceable, differentiable, one per spec."""
