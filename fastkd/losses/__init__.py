"""Distillation losses as functions, and as modules with the same argument names.

The functions take any floating dtype on any device, compute in fp32 (fp64 for fp64) and select a backend per call.
docs/maths.md defines them. The teacher's tensors are constants and must not require grad.
"""

from fastkd.losses.attention import AttentionKD, attention_kd
from fastkd.losses.channel import ChannelKD, channel_kd
from fastkd.losses.channel_attention import ChannelAttentionKD, channel_attention_kd
from fastkd.losses.channel_distribution import ChannelDistributionKD, channel_distribution_kd
from fastkd.losses.cross_modal import DEFAULT_TERMS, CrossModalKD, cross_modal_kd, cross_modal_kd_from_logits
from fastkd.losses.feature import FeatureKD, feature_kd
from fastkd.losses.logit import LogitKD, logit_kd
from fastkd.losses.pixel_relation import PixelRelationKD, pixel_relation_kd

__all__ = [
    "DEFAULT_TERMS",
    "AttentionKD",
    "ChannelAttentionKD",
    "ChannelDistributionKD",
    "ChannelKD",
    "CrossModalKD",
    "FeatureKD",
    "LogitKD",
    "PixelRelationKD",
    "attention_kd",
    "channel_attention_kd",
    "channel_distribution_kd",
    "channel_kd",
    "cross_modal_kd",
    "cross_modal_kd_from_logits",
    "feature_kd",
    "logit_kd",
    "pixel_relation_kd",
]
