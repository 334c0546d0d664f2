"""The mixers that can be named in a policy."""

from __future__ import annotations

from rewriter.mixers.base import Mixer
from rewriter.mixers.plugins import Plugins

MIXERS = Plugins("attention_rewriter.mixers", "mixer", Mixer)
names, get, available = MIXERS.names, MIXERS.get, MIXERS.available
