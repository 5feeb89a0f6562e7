"""openai/consistency_models' `cm.image_datasets`; see `cm.data.loader`."""

from cm.data.loader import *  # noqa: F403
