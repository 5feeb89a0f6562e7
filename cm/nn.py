"""openai/consistency_models' `cm.nn`; see `cm.networks.layers`."""

from cm.networks.layers import *  # noqa: F403
