"""Usage and unevenness of experts by brute force, the oracle of `count_load`."""

import math

from torch import Tensor

# Indices and routing weights, of one shape.
Pass = tuple[Tensor, Tensor]


def usage_and_unevenness(passes: list[Pass], num_experts: int) -> tuple[float, float]:
    """Compute both from the indices and routing weights of all passes of all ranks."""
    weights = [0.0] * num_experts
    for indices, routing_weights in passes:
        slots = zip(indices.flatten().tolist(), routing_weights.flatten().tolist(), strict=True)
        for expert, weight in slots:
            if expert >= 0:
                weights[expert] += abs(weight)
    shares = [weight / sum(weights) for weight in weights]
    usage = sum(share > 0 for share in shares) / num_experts
    return usage, math.log(num_experts) + sum(z * math.log(z) for z in shares if z > 0)
