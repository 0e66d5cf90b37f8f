"""The operators written with torch's own operators: what runs on a CPU without a C++ compiler.

In channels_last, depthwise convolutions and batch norms run two to nine times as fast here as in
torch's default format, and the 1×1 convolutions as fast.

The functions without an underscore are the operators; their schemas are inferred from their type
hints. ``randwire_d2.ops`` explains the shapes of the arguments.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .launches import pieces


def weighted_sum(
    inputs: Sequence[Tensor], coefficients: Tensor, affines: Sequence[Tensor]
) -> Tensor:
    """The sum over i of coefficients[i] · (scale[i] · inputs[i] + shift[i])."""
    if affines:
        return _affine_sum(inputs, coefficients, affines)
    factor, total = _factored_sum(inputs, coefficients)
    return total * factor if total is inputs[0] else total.mul_(factor)


def weighted_sum_backward(
    grads: Sequence[Tensor],
    readers: Sequence[int],
    coefficients: Tensor,
    inputs: Sequence[Tensor],
    affines: Sequence[Tensor],
) -> tuple[list[Tensor], Tensor]:
    """The gradients of weighted sums, for nodes whose outputs y = scale · x + shift they read.

    ``grads`` are the gradients of these sums. Returned are, for each x, scale · (the sum over i of
    coefficients[i] · grads[i]); and ⟨grads[i], y⟩ for each i, as (parts, n): sums over parts of the
    pixels, which the caller adds up.
    """
    results, products = [], []
    for own, x, affine in zip(pieces(readers), inputs, affines, strict=True):
        factor, total = _factored_sum(grads[own], coefficients[own])
        scale = (affine[0] * factor).to(x.dtype)[:, None, None]
        results.append(total * scale if total is grads[own.start] else total.mul_(scale))
        output = _affine_sum([x], coefficients.new_ones(1), [affine])
        products.append(_products(grads[own], output, coefficients))
    return results, torch.cat(products)[None]


def aggregate(
    inputs: Sequence[Tensor],
    degrees: Sequence[int],
    coefficients: Tensor,
    affines: Sequence[Tensor],
    weights: Sequence[Tensor],
    stride: int,
) -> list[Tensor]:
    """For each node: the weighted sum, ReLU, and the 3×3 depthwise convolution."""
    results = []
    for own, weight in zip(pieces(degrees), weights, strict=True):
        factor, data = _activation(inputs[own], coefficients[own], affines[own])
        results.append(_depthwise(data, weight * factor, stride))
    return results


def aggregate_backward(
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    degrees: Sequence[int],
    coefficients: Tensor,
    affines: Sequence[Tensor],
    weights: Sequence[Tensor],
    stride: int,
    want: Sequence[bool],
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """The gradients of the weighted sums, those of the weights, and the result of ``aggregate``.

    The weights' gradients are (nodes, parts, 9, C), in float32 at least: sums over parts of the
    pixels, which the caller adds up for all nodes of a stage at once. The gradients of the inputs
    are not computed here, but by their own nodes, with ``weighted_sum_backward``. ``want`` says
    whether the first and the last result are needed; one that is not is an empty list.
    """
    grad_sums, parts, results = [], [], []
    for grad, own, weight in zip(grads, pieces(degrees), weights, strict=True):
        factor, data = _activation(inputs[own], coefficients[own], affines[own])
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
        parts.append(_wide(grad_weight).mul(factor).reshape(1, -1, 9).transpose(1, 2))
        if want[1]:
            results.append(_depthwise(data, weight * factor, stride))
        if want[0]:
            # The gradient of ReLU: it passes where the result is positive.
            torch.ops.aten.threshold_backward.grad_input(grad_data, data, 0, grad_input=grad_data)
            grad_sums.append(grad_data)
    return grad_sums, torch.stack(parts).contiguous(), results


def separable(
    inputs: Sequence[Tensor],
    degrees: Sequence[int],
    coefficients: Tensor,
    affines: Sequence[Tensor],
    weights: Sequence[Tensor],
    stride: int,
    pointwise: Sequence[Tensor],
) -> list[Tensor]:
    """For each node: ``aggregate``, then the 1×1 convolution."""
    inner = aggregate(inputs, degrees, coefficients, affines, weights, stride)
    return [F.conv2d(x, weight) for x, weight in zip(inner, pointwise, strict=True)]


def separable_backward(
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    degrees: Sequence[int],
    coefficients: Tensor,
    affines: Sequence[Tensor],
    weights: Sequence[Tensor],
    stride: int,
    pointwise: Sequence[Tensor],
    want: bool,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """The gradients of the weighted sums (if ``want``), of ``weights``, both as from
    ``aggregate_backward``, and of ``pointwise``. Only operands of the forward pass are needed."""
    inner = aggregate(inputs, degrees, coefficients, affines, weights, stride)
    grads_inner, grads_pointwise = zip(*map(conv1x1_backward, grads, inner, pointwise), strict=True)
    grad_sums, parts, _ = aggregate_backward(
        grads_inner, inputs, degrees, coefficients, affines, weights, stride, (want, False)
    )
    return grad_sums, parts, [*grads_pointwise]


def conv1x1_backward(
    grad: Tensor, x: Tensor, weight: Tensor, want: tuple[bool, bool] = (True, True)
) -> tuple[Tensor, Tensor]:
    """The gradients of a 1×1 convolution's input and weight, as far as ``want`` says."""
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, (*want, False)
    )
    return grad_x, grad_weight


def batch_norm_statistics(
    inputs: Sequence[Tensor], parameters: Tensor, eps: float
) -> tuple[list[Tensor], Tensor]:
    """The batch norms as affine functions for this batch, and the moments of the batch."""
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
    """For each norm: ``weighted_sum_backward``, then the backward pass of the norm.

    Returns the gradients of the inputs, of the coefficients, and of the parameters.
    """
    grad_inputs, products, grad_parameters = [], [], []
    for x, own, m, edges in zip(inputs, parameters, moments, pieces(readers), strict=True):
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
    if len(grads) == 1:  # then both sums over pixels are already known
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

    Factoring out a coefficient saves a pass over memory: two inputs need one addition, and a single
    input is returned as it is. The largest coefficient is chosen, so that no quotient exceeds 1.
    """
    weights = coefficients.tolist()
    factor = max(weights, key=abs)
    first = weights.index(factor)
    total = inputs[first]
    for i, (x, weight) in enumerate(zip(inputs, weights, strict=True)):
        if i != first:
            # If all coefficients are 0, so is the product.
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
    """In float32 at least, because statistics in half precision are too inexact."""
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
