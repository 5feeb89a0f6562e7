"""How often the weights of networks are converted to another precision."""

import torch as th
from torch.utils._python_dispatch import TorchDispatchMode


class Casts(TorchDispatchMode):
    """While it is entered, counts the conversions of the parameters of these networks; the list may grow."""

    def __init__(self, models):
        super().__init__()
        self.models = models
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "_to_copy" and isinstance(args[0], th.Tensor):
            self.count += args[0].untyped_storage().data_ptr() in self.places()
        return func(*args, **(kwargs or {}))

    def places(self):
        return {param.untyped_storage().data_ptr() for model in self.models for param in model.parameters()}
