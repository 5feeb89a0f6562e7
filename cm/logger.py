"""openai/consistency_models' `cm.logger`; see `cm.logging.logger`."""

from cm.logging.logger import *  # noqa: F403
