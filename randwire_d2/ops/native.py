"""The operators in torch's own, in place where that saves a pass: what a CPU runs uncompiled.

In channels_last, depthwise convolutions and batch norms run two to nine times as fast here as in
torch's default format, and the 1×1 convolutions as fast.

The functions without an underscore are the operators; the schema that torch knows each by is
inferred from its type hints. See ``randwire_d2.ops`` for the arguments' shapes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_sum(
    inputs: Sequence[Tensor], coefficients: Tensor, affines: Sequence[Tensor]
) -> Tensor:
    """The sum over i of coefficients[i] · (scale[i] · inputs[i] + shift[i])."""
    if affines:
        return _affine_sum(inputs, coefficients, affines)
    factor, total = _factored_sum(inputs, coefficients)
    return total * factor if total is inputs[0] else total.mul_(factor)


def weighted_sum_backward(
    grads: Sequence[Tensor], coefficients: Tensor, x: Tensor, affine: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the coefficients that its readers give to its affine function y.

    ``grads`` are those of the weighted sums that read y = scale · x + shift. Returned are scale ·
    the sum over i of coefficients[i] · grads[i], and ⟨grads[i], y⟩ for each i, as (parts, n): sums
    over parts of the pixels, which are yet to be added up.
    """
    factor, total = _factored_sum(grads, coefficients)
    scale = (affine[0] * factor).to(x.dtype)[:, None, None]
    grad_x = total * scale if total is grads[0] else total.mul_(scale)
    output = _affine_sum([x], coefficients.new_ones(1), [affine])
    return grad_x, _products(grads, output, coefficients)[None]


def aggregate(
    inputs: Sequence[Tensor],
    coefficients: Tensor,
    affines: Sequence[Tensor],
    weight: Tensor,
    stride: int,
) -> Tensor:
    """ReLU of the weighted sum, then the 3×3 depthwise convolution."""
    factor, data = _activation(inputs, coefficients, affines)
    return _depthwise(data, weight * factor, stride)


def aggregate_backward(
    grad: Tensor,
    inputs: Sequence[Tensor],
    coefficients: Tensor,
    affines: Sequence[Tensor],
    weight: Tensor,
    stride: int,
    want: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the weighted sum and of the weight, and ``aggregate``'s result, once more.

    The weight's is (parts, 9, C), in float32 at least: sums over parts of the pixels, which are yet
    to be added up, once for all nodes of a stage. Not the gradients of the inputs: their own nodes
    gather them, by ``weighted_sum_backward``. ``want`` says which of the first and the last are
    asked for; one that is not is empty.
    """
    factor, data = _activation(inputs, coefficients, affines)
    grad_data, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad,
        data,
        weight,
        None,
        [stride, stride],
        [1, 1],
        [1, 1],
        False,
        [0, 0],
        weight.shape[0],
        [want[0], True, False],
    )
    # Two tensors, where neither is wanted: what an operator returns must not share memory.
    result = _depthwise(data, weight * factor, stride) if want[1] else grad.new_empty(0)
    parts = _wide(grad_weight).mul(factor).reshape(1, -1, 9).transpose(1, 2).contiguous()
    if not want[0]:
        return grad.new_empty(0), parts, result
    # ReLU's: where it let through, its result is positive.
    torch.ops.aten.threshold_backward.grad_input(grad_data, data, 0, grad_input=grad_data)
    return grad_data, parts, result


def batch_norm_statistics(
    inputs: Sequence[Tensor], parameters: Tensor, eps: float
) -> tuple[list[Tensor], Tensor]:
    """The affine functions that batch norms are for this batch, and the batch's moments."""
    moments = torch.stack(
        [torch.stack(torch.batch_norm_update_stats(_wide(x), None, None, 0.0)) for x in inputs]
    )
    affines = [_affine(own, m, eps) for own, m in zip(parameters, moments, strict=True)]
    return affines, moments


def batch_norm_backward(
    grads: Sequence[Tensor],
    readers: Sequence[int],
    coefficients: Tensor,
    inputs: Sequence[Tensor],
    parameters: Tensor,
    moments: Tensor,
    eps: float,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Of each norm ``weighted_sum_backward``, then the norm's own backward.

    The first ``readers[0]`` of grads and coefficients are those of the first norm's readers, and so
    on. Returned are the gradients of the inputs, of the coefficients, and of the parameters.
    """
    grad_inputs, products, grad_parameters, first = [], [], [], 0
    for x, own, m, n in zip(inputs, parameters, moments, readers, strict=True):
        edges = slice(first, first + n)
        first += n
        grad_x, product, grad_own = _batch_norm_backward(
            grads[edges], coefficients[edges], x, own, m, eps
        )
        grad_inputs.append(grad_x)
        products.append(product)
        grad_parameters.append(grad_own)
    return grad_inputs, torch.cat(products), torch.stack(grad_parameters)


def _batch_norm_backward(
    grads: Sequence[Tensor],
    coefficients: Tensor,
    x: Tensor,
    parameters: Tensor,
    moments: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = moments
    weight, bias = parameters
    factor, grad = _factored_sum(grads, coefficients)
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
        _wide(grad),
        _wide(x),
        weight * factor,
        None,
        None,
        mean,
        torch.rsqrt(var + eps),
        True,
        eps,
        [True, True, True],
    )
    if len(grads) == 1:  # then both sums over pixels are there already
        grad_coefficients = (grad_weight @ weight + grad_bias @ bias)[None]
    else:
        affine = _affine(parameters, moments, eps)
        output = _affine_sum([x], coefficients.new_ones(1), [affine], out=grad)
        grad_coefficients = _products(grads, output, coefficients)
    grad_parameters = torch.stack((grad_weight, grad_bias)).mul_(factor)
    return grad_x.to(x.dtype), grad_coefficients, grad_parameters


def _activation(
    inputs: Sequence[Tensor], coefficients: Tensor, affines: Sequence[Tensor]
) -> tuple[float, Tensor]:
    """A factor and a new tensor; their product is ReLU of the weighted sum."""
    if affines:
        return 1.0, F.relu_(_affine_sum(inputs, coefficients, affines))
    factor, total = _factored_sum(inputs, coefficients)
    if factor < 0:
        return 1.0, F.relu_(total * factor)
    return factor, F.relu(total) if len(inputs) == 1 else F.relu_(total)


def _factored_sum(inputs: Sequence[Tensor], coefficients: Tensor) -> tuple[float, Tensor]:
    """A factor and a tensor; their product is the weighted sum.

    To factor a coefficient out saves a pass over memory: two inputs are one addition, and a single
    one is returned as it is. It is the largest, so that no quotient exceeds 1.
    """
    weights = coefficients.tolist()
    factor = max(weights, key=abs)
    first = weights.index(factor)
    total = inputs[first]
    for i, (x, weight) in enumerate(zip(inputs, weights, strict=True)):
        if i != first:
            # Where all are 0, so is the product.
            ratio = weight / factor if factor else 0.0
            total = (
                total.add(x, alpha=ratio) if total is inputs[first] else total.add_(x, alpha=ratio)
            )
    return factor, total


def _affine_sum(
    inputs: Sequence[Tensor],
    coefficients: Tensor,
    affines: Sequence[Tensor],
    out: Tensor | None = None,
) -> Tensor:
    terms = torch.stack(list(affines)) * coefficients[:, None, None]
    shift = terms[:, 1].sum(dim=0)
    scales = terms[:, 0].to(inputs[0].dtype)[:, :, None, None]
    total = torch.addcmul(shift.to(scales)[:, None, None], inputs[0], scales[0], out=out)
    for x, scale in zip(inputs[1:], scales[1:], strict=True):
        total.addcmul_(x, scale)
    return total


def _depthwise(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    return F.conv2d(x, weight, stride=stride, padding=1, groups=weight.shape[0])


def _wide(x: Tensor) -> Tensor:
    """At least float32: statistics of half precision tensors are worth nothing."""
    return x if x.dtype == torch.float64 else x.float()


def _affine(parameters: Tensor, moments: Tensor, eps: float) -> Tensor:
    mean, var = moments
    weight, bias = parameters
    scale = weight * torch.rsqrt(var + eps)
    return torch.stack((scale, torch.addcmul(bias, mean, scale, value=-1)))


def _products(grads: Sequence[Tensor], output: Tensor, like: Tensor) -> Tensor:
    """⟨grad, output⟩ of each gradient."""
    flat = _flat(output)
    return torch.stack([torch.dot(_flat(grad), flat) for grad in grads]).to(like)


def _flat(x: Tensor) -> Tensor:
    return _wide(x).permute(0, 2, 3, 1).reshape(-1)
