"""openai/consistency_models' `cm.dist_util`; see `cm.distributed.setup`."""

from cm.distributed.setup import *  # noqa: F403
