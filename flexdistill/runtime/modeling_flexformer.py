"""Model classes of converted models, made on demand from the base model's own classes.

`FlexformerGPT2LMHeadModel` is a subclass of `GPT2LMHeadModel` with a feature map in each converted attention module.
Weights keep the base model's names; those of feature maps end in `.flexformer.*`. This file and the ones that it
imports are copied into every checkpoint, where they need torch and transformers only.
"""

import copy

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, conversion_mapping
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .configuration_flexformer import MODEL_TYPE, FlexformerConfigMixin, KernelSpec
from .feature_maps import FeatureMap
from .interface import IMPLEMENTATION, NAME, find_cache_layer, find_rotation
from .registry import build_feature_map

_PREFIX = "Flexformer"
MODEL_TAGS = ("flexformer", "linear-attention")  # of the model card that push_to_hub writes
# what a source's generation settings may ask for and a state cannot serve, as it forgets no single tokens
_ASSISTED = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
_classes: dict[str, type] = {}


class FlexformerConfig(PreTrainedConfig):
    """What AutoConfig finds under model_type "flexformer": hands over to a subclass of the base configuration."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        base_model_type = config_dict.get("base_model_type")
        if base_model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"The checkpoint's base_model_type is {base_model_type!r}, which transformers "
                f"{transformers.__version__} does not know; install a version that has it."
            )
        settings = {name: value for name, value in config_dict.items() if name != "model_type"}
        return flexformer_class(CONFIG_MAPPING[base_model_type]).from_dict(settings, **kwargs)


class FlexformerMixin:
    """Mixed into a subclass of the base model's class: attaches the feature maps that the configuration names."""

    _is_stateful = True  # generate() then refuses what would need to roll the state back

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: what transformers does to the base model's own weights on disk is done here too."""
        return False

    def __init__(self, config, *args, **kwargs):
        # the implementation is checked while the base class builds itself, and set once the feature maps are in place
        config._attn_implementation_internal = None
        super().__init__(config, *args, **kwargs)
        attach_feature_maps(self.base_model, config.kernel_specs)
        for module in self.modules():
            holds_maps = any(isinstance(child, FeatureMap) for child in module.modules())
            if isinstance(module, PreTrainedModel) and not isinstance(module, FlexformerMixin) and holds_maps:
                # an inner model initialises missing weights by its own class
                module.__class__ = flexformer_class(type(module))
        self.set_attn_implementation(IMPLEMENTATION)
        self.register_forward_pre_hook(_unpacked_while_tracing, with_kwargs=True)
        self.add_model_tags(list(MODEL_TAGS))

    def __reduce_ex__(self, protocol):
        """Pickles by the base class, since not every one can be found in transformers by its name alone."""
        cls = type(self)
        if _classes.get(cls.__name__) is not cls:  # a subclass of somebody's own
            return super().__reduce_ex__(protocol)
        _, _, *state = object.__reduce_ex__(self, max(protocol, 2))
        return (_empty_instance, (cls.__bases__[1],), *state)

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, FeatureMap):
            module.reset_parameters()
        else:
            super()._init_weights(module)


def _empty_instance(base: type) -> PreTrainedModel:
    cls = flexformer_class(base)
    return cls.__new__(cls)


def _unpacked_while_tracing(model, args, kwargs):
    """Forward pre-hook: a mask of ones where torch.compile traces a call without mask and positions.

    Tracing, transformers cannot see whether sequences are packed and assumes so unless there is a mask.
    """
    told = any(kwargs.get(name) is not None for name in ("attention_mask", "position_ids", "past_key_values"))
    if not torch.compiler.is_compiling() or told or len(args) > 1:
        return None
    tokens = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
    if tokens is None:
        return None
    return args, {**kwargs, "attention_mask": tokens.new_ones(tokens.shape[:2], dtype=torch.long)}


def attach_feature_maps(base_model: nn.Module, specs: dict[str, KernelSpec]) -> None:
    """Puts a feature map, freshly initialised unless on the meta device, into each named attention module.

    A head over a part of the base model, such as a decoder alone, leaves out what the part does not have.

    Raises:
        ValueError: if it has none of them.
    """
    modules = dict(base_model.named_modules())
    if specs and not specs.keys() & modules.keys():
        raise ValueError(f"{type(base_model).__name__} has none of the converted modules: {', '.join(specs)}.")
    for name, spec in specs.items():
        if name not in modules:
            continue
        module = modules[name]
        feature_map = build_feature_map(spec)
        if not any(tensor.is_meta for tensor in feature_map.state_dict().values()):
            feature_map.reset_parameters()
        module.add_module(NAME, feature_map)
        if hasattr(module, "layer_idx"):
            module.register_forward_pre_hook(find_cache_layer, with_kwargs=True)
        if spec.rotary is not None:
            module.register_forward_pre_hook(find_rotation, with_kwargs=True)


def convert_model(model: PreTrainedModel, specs: dict[str, KernelSpec]) -> PreTrainedModel:
    """A Flexformer model that takes over the weights of `model`, its new feature maps freshly initialised.

    Args:
        model: a model of a class that transformers has; its weights move over, so it must not be used again.
        specs: module name relative to `model.base_model` -> the kernel it gets.
    """
    config_class = flexformer_class(type(model.config))
    settings = {name: value for name, value in model.config.to_dict().items() if name != "model_type"}
    config = config_class(**settings, flexformer={"layers": {name: spec.to_dict() for name, spec in specs.items()}})
    config.auto_map = auto_map(type(model.config))
    device = model.device
    with torch.device("meta"):
        converted = flexformer_class(type(model))(config)
    converted.load_state_dict(model.state_dict(), strict=False, assign=True)
    for name, buffer in model.named_buffers():
        holder, _, leaf = name.rpartition(".")
        converted.get_submodule(holder)._buffers[leaf] = buffer
    for module in converted.modules():
        if isinstance(module, FeatureMap):
            module.to_empty(device=device)
            module.reset_parameters()
    converted.tie_weights()
    if model.can_generate():
        converted.generation_config = copy.deepcopy(model.generation_config)
        for name in _ASSISTED:
            if getattr(converted.generation_config, name, None):
                setattr(converted.generation_config, name, None)
    return converted.train(model.training)


def auto_map(base_config_class: type[PreTrainedConfig]) -> dict[str, str]:
    """The `auto_map` of config.json: which class of this file serves each auto class."""
    module = __name__.rpartition(".")[2]
    heads = {auto: f"{module}.{_PREFIX}{model.__name__}" for auto, model in _auto_classes(base_config_class)}
    return {"AutoConfig": f"{module}.FlexformerConfig", **heads}


def flexformer_class(base: type) -> type:
    """The Flexformer subclass of a configuration or model class that transformers has; always the same object."""
    name = _PREFIX + base.__name__
    if name not in _classes:
        _classes[name] = _config_class(name, base) if issubclass(base, PreTrainedConfig) else _model_class(name, base)
    return _classes[name]


def _config_class(name: str, base: type[PreTrainedConfig]) -> type:
    def __init__(self, flexformer=None, base_model_type=None, **kwargs):
        kwargs.pop("model_type", None)
        base.__init__(self, **kwargs)
        self.flexformer = flexformer or {"layers": {}}

    namespace = {"__module__": __name__, "__qualname__": name, "__init__": __init__}
    cls = _classes[name] = type(name, (FlexformerConfigMixin, base), namespace)
    for auto, model in _auto_classes(base):
        getattr(transformers, auto).register(cls, flexformer_class(model), exist_ok=True)
    return cls


def _model_class(name: str, base: type[PreTrainedModel]) -> type:
    namespace = {
        "__module__": __name__,
        "__qualname__": name,
        "config_class": flexformer_class(base.config_class),
        # transformers reads a class's configuration from this annotation, and would find the base's
        "config": None,
        # kernels keep full precision in a model of less: their small updates would be lost
        "_keep_in_fp32_modules_strict": [*(base._keep_in_fp32_modules_strict or ()), NAME],
        # checkpoints from before there were units were made with units of 1, as these begin
        "_keys_to_ignore_on_load_missing": [*(base._keys_to_ignore_on_load_missing or ()), rf"\.{NAME}\.\w+_unit$"],
    }
    if name in _classes:  # made while its configuration class was
        return _classes[name]
    cls = type(name, (FlexformerMixin, base), namespace)
    heads = [auto for auto, model in _auto_classes(base.config_class) if model is base]
    # a causal model often serves pretraining too, and is asked for by its own name
    named = [auto for auto in heads if auto != "AutoModelForPreTraining"]
    cls._auto_class = (named or heads or ["AutoModel"])[0]
    # both are looked up by the name of the class
    renamings = conversion_mapping.get_checkpoint_conversion_mapping(base.__name__)
    if renamings:
        conversion_mapping.register_checkpoint_conversion_mapping(name, renamings, overwrite=True)
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(cls), base._can_record_outputs)
    return cls


def _auto_classes(base_config_class: type[PreTrainedConfig]) -> list[tuple[str, type[PreTrainedModel]]]:
    """(auto class name, model class) of every head that transformers has for a configuration."""
    found = []
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and base_config_class in mapping:
            models = mapping[base_config_class]
            models = models if isinstance(models, (tuple, list)) else (models,)
            # a head that another model type lends builds itself from that type's configuration
            found += [(name, model) for model in models[:1] if model.config_class is base_config_class]
    return found


def __getattr__(name: str):
    """Classes made on demand, so that `auto_map` and pickle can name any of them (PEP 562)."""
    base = getattr(transformers, name.removeprefix(_PREFIX), None) if name.startswith(_PREFIX) else None
    if not isinstance(base, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return flexformer_class(base)


# the copy inside a checkpoint is found through its auto_map; registering it would let it serve other checkpoints
if not __name__.startswith("transformers_modules."):
    AutoConfig.register(MODEL_TYPE, FlexformerConfig, exist_ok=True)
