"""Feature maps of other papers, under the same contract, to compare with."""

import torch
from transformers import initialization as init

from .configuration_flexformer import KernelSpec
from .feature_maps import FeatureMap, project


class HedgehogFeatureMap(FeatureMap):
    """phi(x) = [softmax(W x), softmax(-W x)], W learned per head and started at the identity (arXiv:2402.04347)."""

    paper = "Hedgehog, arXiv:2402.04347"
    calibrated = False

    def __init__(self, spec: KernelSpec):
        super().__init__(spec)
        self._add_maps(w=(spec.head_dim, spec.num_frequencies))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        w = self.query_parameters["w"]
        init.copy_(w, torch.eye(*w.shape[1:], device=w.device, dtype=w.dtype).expand_as(w))
        self._start_alike()

    def _features(self, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        projected = project(x, w)
        features = torch.cat([projected.softmax(-1), (-projected).softmax(-1)], -1)
        return features, features.new_zeros(features.shape[:-1])

    def query_features(self, query):
        return self._features(query, self._maps()[0]["w"])

    def key_features(self, key):
        return self._features(key, self._maps()[1]["w"])
