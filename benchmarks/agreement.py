"""Worst relative differences between the three forms of Flexformer attention, outputs and gradients, in float32.

python benchmarks/agreement.py
"""

import torch

from flexdistill.runtime.attention import attend, attention_weights
from flexdistill.runtime.configuration_flexformer import KernelSpec
from flexdistill.runtime.registry import build_feature_map, feature_map_class, kernels

LENGTHS = (1, 63, 500)


def compare(variant: str, component: str | None, window: int, causal: bool = True) -> dict[str, float | None]:
    """Largest difference over the lengths; half of the batch is padded on the left by a third."""
    worst = {"chunked": 0.0, "recurrent": 0.0 if causal else None, "gradients": 0.0}
    for length in LENGTHS:
        torch.manual_seed(length)
        kernel = feature_map_class(variant, component)
        matrix, horizon = next(iter(kernel.matrices), None), max(LENGTHS) if kernel.has_horizon else None
        spec = KernelSpec(
            variant, component, 4, 2, 32, 32, kernel.tied_by_default, "query", window, causal, matrix, horizon
        )
        feature_map = build_feature_map(spec)
        feature_map.reset_parameters()
        query, key, value = (torch.randn(2, heads, length, 32, requires_grad=True) for heads in (4, 2, 2))
        visible = torch.ones(2, length, dtype=torch.bool)
        visible[1, : length // 3] = False
        arguments = {"scaling": 32**-0.5, "visible": visible}

        expected = attention_weights(feature_map, query, key, **arguments) @ value.repeat_interleave(2, dim=1)
        chunked, _ = attend(feature_map, query, key, value, **arguments)
        steps, memory = [], None
        for t in range(length if causal else 0):
            token = slice(t, t + 1)
            inputs = (x[:, :, token] for x in (query, key, value))
            output, memory = attend(feature_map, *inputs, scaling=32**-0.5, visible=visible[:, token], memory=memory)
            steps.append(output)
        leaves = [query, key, value, *feature_map.parameters()]
        direction = torch.randn_like(expected)
        ours, reference = (
            torch.cat([x.flatten() for x in torch.autograd.grad((y * direction).sum(), leaves, materialize_grads=True)])
            for y in (chunked, expected)
        )
        found = {"chunked": relative(chunked, expected), "gradients": relative(ours, reference)}
        if steps:
            found["recurrent"] = relative(torch.cat(steps, dim=2), expected)
        worst |= {name: max(worst[name], value) for name, value in found.items()}
    return worst


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm())


def main() -> None:
    print(f"{'kernel':32}{'window':>10}{'chunked':>12}{'recurrent':>12}{'gradients':>12}")
    for variant, component in kernels():
        for window, causal in ((0, True), (64, True), (0, False)):
            if causal and not feature_map_class(variant, component).causal_safe:
                continue
            figures = compare(variant, component, window, causal)
            place = str(window) if causal else "both ways"
            cells = ("-" if figure is None else f"{figure:.1e}" for figure in figures.values())
            print(f"{variant + ' ' + (component or ''):32}{place:>10}" + "".join(f"{cell:>12}" for cell in cells))


if __name__ == "__main__":
    main()
