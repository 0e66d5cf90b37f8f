"""The public layouts of RandWire as plain modules, for tests: same names, same arithmetic.

Written from reading seungwonpark/RandWireNN and JiaminRen/RandWireNN; nothing here knows
``randwire_d2``. ``features`` maps images (N, 3, H, W) to res2 … res5, ``logits`` to (N, classes),
``state_dict`` is what those repositories save.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Graph = tuple[int, list[tuple[int, int]]]  # nodes; edges, in the order of the file


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and statistic random, so that none can be left out unnoticed; eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def fill(tensor: Tensor, low: float, high: float) -> None:
        with torch.no_grad():
            tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))

    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            fill(part.weight, 0.5, 1.5)
            fill(part.bias, -0.5, 0.5)
            fill(part.running_mean, -0.5, 0.5)
            fill(part.running_var, 0.5, 1.5)
        elif isinstance(part, nn.Conv2d):
            limit = (3 / part.weight[0].numel()) ** 0.5
            fill(part.weight, -2 * limit, 2 * limit)
            if part.bias is not None:
                fill(part.bias, -0.5, 0.5)
        elif isinstance(part, nn.Linear):
            fill(part.weight, -0.1, 0.1)
            fill(part.bias, -0.5, 0.5)
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.ndim == 1 and name.endswith("weight") and not hasattr(part, "eps"):
                fill(parameter, -2, 2)  # of an aggregation
    return module.eval()


class SeparableSP(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.conv1(x))


class NodeSP(nn.Module):
    def __init__(self, degree: int, inputs: int, outputs: int, always_weighted: bool) -> None:
        super().__init__()
        if degree > 1 or always_weighted:
            self.agg_weight = nn.Parameter(torch.zeros(max(degree, 1)))
        self.conv = SeparableSP(inputs, outputs, 2 if degree == 0 else 1)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        total = inputs[0]
        if hasattr(self, "agg_weight"):
            total = sum(w * x for w, x in zip(torch.sigmoid(self.agg_weight), inputs, strict=True))
        return self.bn(self.conv(F.relu(total)))


class LayerSP(nn.Module):
    def __init__(self, inputs: int, outputs: int, graph: Graph, always_weighted: bool) -> None:
        super().__init__()
        self.num_nodes, self.edges = graph
        # A node reads its sources in the order in which the file has the edges.
        self.sources = [[u for u, v in self.edges if v == node] for node in range(self.num_nodes)]
        self.nodes = nn.ModuleList(
            NodeSP(len(s), outputs if s else inputs, outputs, always_weighted) for s in self.sources
        )

    def forward(self, x: Tensor) -> Tensor:
        results: dict[int, Tensor] = {}

        def result(node: int) -> Tensor:
            if node not in results:
                inputs = [result(u) for u in self.sources[node]] or [x]
                results[node] = self.nodes[node](inputs)
            return results[node]

        outputs = set(range(self.num_nodes)) - {u for u, _ in self.edges}
        return torch.stack([result(node) for node in sorted(outputs)]).mean(0)


class Seungwonpark(nn.Module):
    def __init__(
        self, channels: int, graphs: Sequence[Graph], always_weighted: bool = False
    ) -> None:
        super().__init__()
        c = channels
        self.conv1 = nn.Conv2d(3, c // 2, 3, 2, 1)
        self.bn1 = nn.BatchNorm2d(c // 2)
        self.conv2 = nn.Conv2d(c // 2, c, 3, 2, 1)
        self.bn2 = nn.BatchNorm2d(c)
        self.dagly3 = LayerSP(c, c, graphs[0], always_weighted)
        self.dagly4 = LayerSP(c, 2 * c, graphs[1], always_weighted)
        self.dagly5 = LayerSP(2 * c, 4 * c, graphs[2], always_weighted)
        self.convlast = nn.Conv2d(4 * c, 1280, 1)
        self.bnlast = nn.BatchNorm2d(1280)
        self.fc = nn.Linear(1280, 10)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        x = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(images)))))
        features = {"res2": x}
        for i in range(3, 6):
            features[f"res{i}"] = x = getattr(self, f"dagly{i}")(x)
        return features

    def logits(self, images: Tensor) -> Tensor:
        """What their log_softmax is computed from."""
        x = self.bnlast(self.convlast(F.relu(self.features(images)["res5"])))
        return self.fc(F.adaptive_avg_pool2d(x, (1, 1)).flatten(1))


class SeparableJR(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs)
        self.pointwise = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


class TripletJR(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = SeparableJR(inputs, outputs, stride)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(F.relu(x)))


class NodeJR(nn.Module):
    def __init__(self, degree: int, inputs: int, outputs: int) -> None:
        super().__init__()
        if degree > 1:
            self.mean_weight = nn.Parameter(torch.ones(degree))
        self.conv = TripletJR(outputs if degree else inputs, outputs, 1 if degree else 2)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        total = inputs[0]
        if len(inputs) > 1:
            total = torch.sigmoid(self.mean_weight[0]) * inputs[0]
            for i in range(1, len(inputs)):
                total = total + torch.sigmoid(self.mean_weight[i]) * inputs[i]
        return self.conv(total)


class StageJR(nn.Module):
    def __init__(self, inputs: int, outputs: int, graph: Graph) -> None:
        super().__init__()
        num_nodes, edges = graph
        self.sources = [sorted(u for u, v in edges if v == node) for node in range(num_nodes)]
        self.last = sorted(set(range(num_nodes)) - {u for u, _ in edges})
        self.nodeop = nn.ModuleList(NodeJR(len(s), inputs, outputs) for s in self.sources)

    def forward(self, x: Tensor) -> Tensor:
        results: list[Tensor] = []
        for node, sources in zip(self.nodeop, self.sources, strict=True):
            results.append(node([results[u] for u in sources] or [x]))
        return sum(results[node] for node in self.last) / len(self.last)


class JiaminRen(nn.Module):
    def __init__(self, regime: str, channels: int, graphs: Sequence[Graph]) -> None:
        super().__init__()
        c = channels
        self.conv1 = SeparableJR(3, c // 2, 2)
        self.bn1 = nn.BatchNorm2d(c // 2)
        inputs, stages = c // 2, list(range(2, 6))
        if regime == "small":
            self.conv2 = TripletJR(c // 2, c, 2)
            inputs, stages = c, [3, 4, 5]
        for i, (stage, graph) in enumerate(zip(stages, graphs, strict=True)):
            self.add_module(f"conv{stage}", StageJR(inputs, c * 2**i, graph))
            inputs = c * 2**i
        self.conv = nn.Conv2d(inputs, 1280, 1)
        self.bn2 = nn.BatchNorm2d(1280)
        self.fc = nn.Linear(1280, 10)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        x = self.bn1(self.conv1(images))
        features = {}
        for i in range(2, 6):
            features[f"res{i}"] = x = getattr(self, f"conv{i}")(x)
        return features

    def logits(self, images: Tensor) -> Tensor:
        """Their pool is 7×7: all of res5 at 224×224, the only size that their fc layer takes."""
        x = F.relu(self.bn2(self.conv(F.relu(self.features(images)["res5"]))))
        return self.fc(F.adaptive_avg_pool2d(x, (1, 1)).flatten(1))
