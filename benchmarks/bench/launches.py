"""Operations that a step gives to its device: a figure that depends neither on the machine nor on its load.

On a GPU each is at least one launch, which costs some microseconds of the host whatever its size; a small network waits
for them. They are counted on the device "meta", which has shapes and no values, so the paths are those of a GPU and no
GPU is needed. Of an operation on a list of tensors a GPU makes one launch for some dozens of them; here it counts once.
A convolution in a forward pass counts with the launches that torch makes around cuDNN's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch as th
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import objectives, train
from bench.baseline import plain_copy, plain_heun, plain_one_step
from bench.lines import Line
from bench.network import NetworkSpec
from bench.sample import HEUN_STEPS, toolkit_way
from cm.karras_diffusion import KarrasDenoiser
from cm.networks.compile import compile_network
from cm.networks.held import weights_held
from cm.train_util import TrainLoop
from cm.training.memory_estimate import AsOnGpu

META, CPU = th.device("meta"), th.device("cpu")
aten = th.ops.aten
COMPOSITE = th._C.DispatchKey.CompositeImplicitAutograd
NO_LAUNCH = {
    "view", "_unsafe_view", "_reshape_alias", "as_strided", "t", "transpose", "permute", "expand", "slice", "select",
    "squeeze", "unsqueeze", "detach", "alias", "split", "split_with_sizes", "chunk", "unbind", "unfold", "empty",
    "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh", "is_pinned", "resize_", "set_",
}
"""Operations that compute nothing: other views of the same numbers, and memory without values."""


CALL = re.compile(r"\s*(\w+ = )?(cpp_fused\w*|extern_kernels\.\w+|torch\.ops\.\w+\.\w+\.\w+)\(")
"""A line of generated code that computes."""

AGE = 100                                                   # steps after which an optimizer does what it always does


class LaunchCounter(TorchDispatchMode):
    """While it is entered, counts the operations on the device that compute, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.upsample_nearest2d.vec:             # which "meta" takes apart under inference_mode
            size = [int(side * factor) for side, factor in zip(args[0].shape[2:], args[2])]
            return self.__torch_dispatch__(aten.upsample_nearest2d.default, types, (args[0], size))
        if th._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE.name):
            with self:                                      # comes here whole under inference_mode
                return func._op_dk(COMPOSITE, *args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_here = any(tensor.device == META for tensor in tensors) or th.device(kwargs.get("device") or "cpu") == META
        name = func.overloadpacket.__name__
        self.names[name] += is_here and name not in NO_LAUNCH
        if is_here and func is aten._local_scalar_dense.default:
            return th.ones((), dtype=args[0].dtype).item()  # a value of a device that has none
        if is_here and name == "_to_copy" and th.device(kwargs.get("device") or META) != META:
            return th.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if is_here and func is aten.convolution.default:
            return self._convolution(*args, **kwargs)
        return func(*args, **kwargs)

    def _convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """As torch asks cuDNN: both in the memory format of one of them; the bias is added to the result."""
        is_last = th.channels_last in (suggest_memory_format(x), suggest_memory_format(weight))
        memory_format = th.channels_last if is_last else th.contiguous_format
        self.names["bias of convolution"] += bias is not None
        self.names["copy for convolution"] += sum(
            not each.is_contiguous(memory_format=memory_format) for each in (x, weight)
        )
        return aten.convolution.default(x, weight, bias, *args, **kwargs).contiguous(memory_format=memory_format)


class FusedAttention(th.autograd.Function):
    """Attention by a GPU's kernels: one operation forward, one backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return th.sigmoid(q)                                # any one operation of these shapes

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = th.sigmoid(grad)
        return wide, th.empty_like(wide), th.empty_like(wide)


class SiLU(th.autograd.Function):
    """SiLU by a GPU's kernels: "meta" takes the derivative in six operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return aten.silu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return th.sigmoid(grad)


class AsCountedOnGpu(AsOnGpu):
    """The operations of a GPU: fused attention, and autocast's conversions, which "meta" does not know."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            dtype = th.bfloat16 if self.is_autocast else args[0].dtype
            return FusedAttention.apply(*(arg.to(dtype) for arg in args))
        if func is F.silu:
            return SiLU.apply(*args)
        return super().__torch_function__(func, types, args, kwargs)


def launches_of(
    step: Callable[[], object], precision: str = "fp32", opt: th.optim.Optimizer | None = None
) -> Counter[str]:
    """Operations of a step by name, after one that makes what is kept.

    :param opt: the optimizer of the step, whose first steps are not counted: RAdam does less in them.
    """
    for _ in range(2):
        with AsCountedOnGpu(precision), LaunchCounter() as counter:
            step()
        for state in opt.state.values() if opt else ():
            state["step"] += AGE
    return counter.names


# --- the suite -------------------------------------------------------------------------------------------------------


def launches_suite(spec: NetworkSpec) -> list[Line]:
    """A line for each training step and for sampling, the plain way's and the toolkit's."""
    lines = []
    for mode in train.PASSES:
        for precision in ("fp32", "bf16"):
            lines += training_lines(mode, precision, spec)
    plain, own = one_step(spec)
    lines += [*pair("onestep (1 NFE)", "fp32", plain, own), compiled_line(spec, plain)]
    lines += pair(f"heun ({2 * HEUN_STEPS - 1} NFE)", "fp32", *heun(spec))
    counts = {}
    for name, how in objectives.JOBS.items():
        loop = as_on_gpu(objectives.loop_of(*how[:3], spec, META, spec.images(META)))
        counts[name] = launches_of(partial(step_of, loop), opt=loop.opt).total()
        note = f"{counts[name] / counts['edm']:.2f} of edm's"
        lines.append(Line("launches", f"{name}, one average, toolkit fp32", None, launches=counts[name], note=note))
    return lines


def training_lines(mode: str, precision: str, spec: NetworkSpec) -> list[Line]:
    """The plain way's line and the toolkit's, whose note says how much of it are passes of the networks."""
    images = spec.images(META)
    plain_way = train.plain_job(mode, spec, META, images)
    plain = launches_of(plain_way, precision, plain_way.func.opt)
    loop = as_on_gpu(train.toolkit_loop(mode, spec, META, images, precision))
    own = launches_of(partial(step_of, loop), precision, loop.opt)
    passes = launches_of(partial(passes_of, loop), precision).total()
    lines = pair(mode, precision, plain, own)
    return [lines[0], replace(lines[1], note=f"{passes:,} in the passes, {own.total() - passes:,} in the rest")]


def as_on_gpu(loop: TrainLoop) -> TrainLoop:
    """The loop with what torch does for a GPU by itself, and "meta" does not know."""
    for network in loop.trained.values():
        network.trainer.autocast = nullcontext              # its conversions are `AsCountedOnGpu`'s
        for group in network.opt.param_groups:
            group["foreach"] = True
    return loop


def step_of(loop: TrainLoop) -> None:
    """One step of training."""
    loop.run_step(next(loop.data))


def passes_of(loop: TrainLoop) -> None:
    """The forward and backward passes of a step."""
    loop.trainer.zero_grad()
    loop.forward_backward(next(loop.data))


def pair(name: str, precision: str, plain: Counter[str], own: Counter[str]) -> list[Line]:
    """Two lines, the second with its ratio to the first."""
    return [
        Line("launches", f"{name}, plain {precision}", None, launches=plain.total()),
        Line("launches", f"{name}, toolkit {precision}", None, launches=own.total(),
             launches_over_plain=own.total() / plain.total()),
    ]


def one_step(spec: NetworkSpec) -> tuple[Counter[str], Counter[str]]:
    """The operations of sampling in one step, the plain way's and the toolkit's."""
    model, noise = spec.build(META).eval(), spec.images(META)
    diffusion = KarrasDenoiser(distillation=True, loss_norm="l2")
    plain = partial(plain_one_step, diffusion, plain_copy(model), noise)
    return launches_of(plain), sampling_launches(model, diffusion, "onestep", 1, noise.shape)


def compiled_line(spec: NetworkSpec, plain: Counter[str]) -> Line:
    """Sampling in one step with --compile."""
    launches = compiled_pass(spec) + around_a_pass(spec)
    return Line("launches", "onestep (1 NFE), toolkit compiled fp32", None, launches=launches,
                launches_over_plain=launches / plain.total(), note="in code that is generated for a CPU")


def compiled_pass(spec: NetworkSpec) -> int:
    """The calls in the code that --compile generates for a pass: of its own kernels and of libraries."""
    from torch._inductor.utils import run_and_get_code  # takes seconds

    model, images = spec.build(CPU).eval(), spec.images(CPU)
    compile_network(model, CPU)
    with th.no_grad():
        _, (code,) = run_and_get_code(model, images, images.new_ones(len(images)))
    lines = code[code.index("def call("):].splitlines()
    return sum(bool(CALL.match(line)) for line in lines)


def around_a_pass(spec: NetworkSpec) -> int:
    """The operations of sampling in one step beside the pass."""
    diffusion, network = KarrasDenoiser(distillation=True, loss_norm="l2"), NoNetwork(1, 1, device=META)
    step = partial(toolkit_way, network, diffusion, "onestep", 1, spec.images(META).shape, "fp32")
    return launches_of(step).total()


class NoNetwork(nn.Linear):
    """Has a device, and no operations."""

    def forward(self, input: Tensor, *_: Tensor) -> Tensor:
        return input


def heun(spec: NetworkSpec) -> tuple[Counter[str], Counter[str]]:
    """The operations of Heun's method, the plain way's and the toolkit's."""
    model, diffusion, noise = spec.build(META).eval(), KarrasDenoiser(loss_norm="l2"), spec.images(META)
    plain, levels = plain_copy(model), [*diffusion.noise_levels(HEUN_STEPS).tolist(), 0.0]
    own = sampling_launches(model, diffusion, "heun", HEUN_STEPS, noise.shape)
    return launches_of(lambda: plain_heun(diffusion, plain, noise, levels)), own


def sampling_launches(model: nn.Module, diffusion: KarrasDenoiser, sampler: str, steps: int, shape: th.Size) -> Counter:
    """The toolkit's operations for one of the batches of a command, which holds what depends on the weights alone."""
    with th.no_grad(), weights_held(model):
        return launches_of(partial(toolkit_way, model, diffusion, sampler, steps, shape, "fp32"))
