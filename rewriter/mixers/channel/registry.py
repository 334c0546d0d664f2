"""The channel mixers that can be named in a policy."""

from __future__ import annotations

from rewriter.mixers.channel.base import ChannelMixer
from rewriter.mixers.plugins import Plugins

MIXERS = Plugins("attention_rewriter.channel_mixers", "channel mixer", ChannelMixer)
names, get, available = MIXERS.names, MIXERS.get, MIXERS.available
