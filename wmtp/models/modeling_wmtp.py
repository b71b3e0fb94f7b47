"""A causal language model of `transformers` with the extra heads of multi-token prediction; an export carries a copy.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.generate(**tokenizer(text, return_tensors="pt"), do_sample=False)     # self-speculative, the same text
    model(input_ids, num_heads=4).head_logits                                   # [4, B, S, V]

Trunk and head 1 are the family's own class, `LlamaForCausalLM` for one. An extra head is one more decoder layer of that
class beside the last one, on the same input; norm and unembedding are shared (Gloeckle et al. 2024, arXiv 2404.19737).
With looped_heads one layer serves heads 2 to H: head 2 reads its output, head k + 1 its output on that for head k.
Without trust_remote_code the folder is head 1 alone. This file needs torch and transformers, and nothing else.
"""

import functools
import inspect
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import DynamicCache
from transformers.utils import cached_file, logging

WEIGHTS, CONFIG = "mtp_heads.safetensors", "mtp_config.json"
_OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# Kinds of RoPE whose angles depend on the longest sequence so far, and so on how far a window of drafts reaches.
_LENGTH_DEPENDENT = ("dynamic", "longrope")
# What `generate` hands over and drafting heeds; any other input is left to the family's own decoding.
_HEEDED = {
    "attention_mask", "cache", "cache_position", "generation_config", "logits_processor", "logits_to_keep",
    "num_logits_to_keep", "past_key_values", "position_ids", "stopping_criteria", "streamer", "synced_gpus",
    "tokenizer", "use_cache",
}  # fmt: skip
logger = logging.get_logger(__name__)


def __getattr__(name: str) -> type:
    """Returns the class of a family with heads, under the family's name: LlamaForCausalLM, Qwen3ForCausalLM, ..."""
    family = getattr(transformers, name, None) if name.endswith("ForCausalLM") else None
    if family is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _with_heads(family)


def _cache_of(kwargs: dict) -> Any:
    """Returns the cache that a call was given under either of its names, or None."""
    return kwargs.get("cache", kwargs.get("past_key_values"))


@functools.cache
def _with_heads(family: Any) -> Any:
    about = {"__module__": __name__, "__doc__": f"The {family.__name__} of transformers with extra heads."}
    made: Any = type(family.__name__, (MTPHeads, family), about)

    def forward(self, *args, **kwargs):
        return MTPHeads.forward(self, *args, **kwargs)

    # `generate` and `Trainer` ask the signature what the model takes.
    signature = inspect.signature(family.forward)
    parameters = list(signature.parameters.values())
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    parameters.insert(at, inspect.Parameter("num_heads", inspect.Parameter.KEYWORD_ONLY, default=None))
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    made.forward = forward
    return made


class MTPHeads:
    """What a family's class gains: heads 2 to H, their logits, and decoding that drafts with them."""

    _keys_to_ignore_on_load_missing = [r"^extra_heads\."]  # noqa: RUF012  # they come from a file of their own

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        last = len(self.model.layers) - 1
        self.extra_heads = torch.nn.ModuleList()
        self._looped = getattr(config, "looped_heads", False)
        self._further = getattr(config, "num_future_tokens", 1) - 1  # heads beside the first
        for _ in range(min(self._further, 1) if self._looped else self._further):
            head = type(self.model.layers[last])(config, last)  # of the last layer's kind: full or sliding attention
            self.extra_heads.append(head)
        self.extra_heads.apply(self._init_weights)

    # ------------------------------------------------------------------------------------------------------------------
    # Files

    @classmethod
    def from_pretrained(cls, name, *args, **kwargs):
        loaded = super().from_pretrained(name, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if not model.extra_heads:
            return loaded
        file = cached_file(name, WEIGHTS, **{key: kwargs[key] for key in _OF_THE_HUB if key in kwargs})
        if any(parameter.is_meta for parameter in model.extra_heads.parameters()):
            raise ValueError("the extra heads do not load offloaded; give a device_map that holds extra_heads whole")
        # With num_future_tokens below the file's, the further heads stay there.
        heads = {key.removeprefix("extra_heads."): tensor for key, tensor in load_file(file).items()}
        wanted = {key: tensor for key, tensor in heads.items() if int(key.split(".")[0]) < len(model.extra_heads)}
        stored = 1 + len({key.split(".")[0] for key in heads})
        if stored <= len(model.extra_heads):
            raise ValueError(
                f"num_future_tokens must be at most the {stored} of {file}, got {1 + len(model.extra_heads)}"
            )
        model.extra_heads.load_state_dict(wanted)
        return loaded

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, push_to_hub=False, **kwargs):
        """Writes the layout of an export: head 1's files as ever, and the extra heads in their own."""
        if push_to_hub:
            raise ValueError("save_pretrained(push_to_hub=True) would leave the heads out; call push_to_hub() instead")
        state = self.state_dict() if state_dict is None else state_dict
        heads = {key: tensor.contiguous() for key, tensor in state.items() if key.startswith("extra_heads.")}
        state = {key: tensor for key, tensor in state.items() if key not in heads}
        super().save_pretrained(save_directory, is_main_process, state, **kwargs)
        if not is_main_process or not heads:
            return
        folder = Path(save_directory)
        save_file(heads, folder / WEIGHTS, metadata={"format": "pt"})
        about = {"num_future_tokens": 1 + self._further, **({"looped_heads": True} if self._looped else {})}
        (folder / CONFIG).write_text(json.dumps(about) + "\n")

    # ------------------------------------------------------------------------------------------------------------------
    # Logits

    def forward(self, *args, num_heads=None, **kwargs):
        """Runs the family's forward, with the logits of heads 1 to num_heads as ``head_logits`` [num_heads, B, S, V].

        None or 1 is the family's forward alone. A cache that is passed with more must be a ``DynamicCache()`` without
        a config, which has room for the heads' layers, and be passed with as many from its first token on; ``labels``
        are for head 1, without num_heads. The last of ``hidden_states`` has the heads' states one after another.
        """
        if num_heads is None or num_heads == 1:
            return super().forward(*args, **kwargs)
        if not 1 <= num_heads <= 1 + self._further:
            raise ValueError(f"num_heads must be between 1 and the model's {1 + self._further}, got {num_heads}")
        if kwargs.get("labels") is not None:
            raise ValueError("labels are for head 1; leave num_heads out, or take the loss of head_logits yourself")
        cache = _cache_of(kwargs)
        if cache is None and kwargs.get("use_cache") is not False:
            kwargs[self._cache_name] = DynamicCache()
        for k in range(2, num_heads + 1) if hasattr(cache, "get_seq_length") else ():
            layer = len(self.model.layers) + k - 2
            if layer >= len(getattr(cache, "layers", ())) and getattr(cache, "layer_class_to_replicate", 1) is None:
                raise ValueError("the cache has no room for the heads; pass a DynamicCache() without a config")
            if cache.get_seq_length(layer) != cache.get_seq_length():
                raise ValueError(
                    f"head {k} has {cache.get_seq_length(layer)} of the cache's {cache.get_seq_length()} tokens; pass "
                    f"num_heads={num_heads} from the first token on"
                )

        def beside(layer, inputs, options, output):
            # Heads become rows of the batch: what follows the last layer in the family's code serves them all.
            states = [output if torch.is_tensor(output) else output[0]]
            for j in range(num_heads - 1):
                head = self.extra_heads[0 if self._looped else j]
                head.self_attn.layer_idx = len(self.model.layers) + j  # its place in the cache of keys and values
                state = head(*inputs, **options)
                state = state if torch.is_tensor(state) else state[0]
                states.append(state.to(states[0].device))
                if self._looped:
                    inputs = (state, *inputs[1:])
            rows = torch.cat(states)
            return rows if torch.is_tensor(output) else (rows, *output[1:])

        hook = self.model.layers[-1].register_forward_hook(beside, with_kwargs=True)
        try:
            output = super().forward(*args, **{**kwargs, "return_dict": True})
        finally:
            hook.remove()
        output["head_logits"] = output.logits.unflatten(0, (num_heads, -1))
        output["logits"] = output.head_logits[0]
        return output

    # ------------------------------------------------------------------------------------------------------------------
    # Decoding

    @functools.cached_property
    def _cache_name(self):
        """What the release of `transformers` calls the cache of keys and values: from 5.24 on `cache`."""
        return "cache" if "cache" in inspect.signature(super().forward).parameters else "past_key_values"

    def _sample(self, input_ids, *args, num_heads=None, **kwargs):
        """Decodes for `generate`, greedily or by sampling. Greedy decoding of one prompt is self-speculative.

        Heads 2 to num_heads (by default all) draft the tokens after the next, and one forward verifies them. Each token
        is head 1's choice after the tokens before it, so the text is that of plain decoding.
        """
        num_heads = 1 + self._further if num_heads is None else num_heads
        if num_heads > 1 and (why := self._plainly(input_ids, args, kwargs)):
            logger.warning_once(f"plain decoding, without the extra heads: {why}")
            num_heads = 1
        if num_heads == 1:
            return super()._sample(input_ids, *args, **kwargs)
        processor, criteria, streamer = (kwargs.get(k) for k in ("logits_processor", "stopping_criteria", "streamer"))
        cache, ids, window = DynamicCache(), input_ids, input_ids
        options = {key: kwargs[key] for key in ("logits_to_keep", "num_logits_to_keep") if key in kwargs}
        drafts = input_ids.new_empty(0)
        finished = False
        while not finished:
            kept = {self._cache_name: cache, "use_cache": True}
            out = self(input_ids=window, num_heads=num_heads, **kept, **options)
            logits = out.head_logits[:, 0, -1 - len(drafts) :].float()  # [H, 1 + drafts, V]
            for i in range(1 + len(drafts)):
                token = processor(ids, logits[0, i : i + 1]).argmax(-1)
                ids = torch.cat([ids, token[:, None]], dim=1)
                if streamer is not None:
                    streamer.put(token.cpu())
                finished = bool(criteria(ids, None).all())
                if finished or i == len(drafts) or bool(drafts[i] != token):
                    break
            if i < len(drafts):
                cache.crop(i - len(drafts))  # the refused drafts' keys and values
            drafts, options = logits[1:, i].argmax(-1), {}
            window = torch.cat([token, drafts])[None]
        if streamer is not None:
            streamer.end()
        return ids

    def _plainly(self, input_ids, args, kwargs):
        """Returns why a call has to decode plainly, or None."""
        config, cache = kwargs.get("generation_config"), _cache_of(kwargs)
        mask, rope = kwargs.get("attention_mask"), getattr(self.config, "rope_parameters", None)
        rope = rope or getattr(self.config, "rope_scaling", None) or {}
        ropes = [rope, *(each for each in rope.values() if isinstance(each, dict))]  # or one for each kind of layer
        places = kwargs.get("position_ids")
        others = [key for key in kwargs.keys() - _HEEDED if kwargs[key] is not None and kwargs[key] is not False]
        reasons = {
            "this release of transformers is too old": args or config is None or not hasattr(DynamicCache, "crop"),
            "sampling": config is not None and config.do_sample,
            "several prompts": input_ids.shape[0] != 1,
            "a padded prompt": mask is not None and not bool(mask.all()),
            "use_cache is false": kwargs.get("use_cache") is False,
            "a cache that has tokens, or is not dynamic": type(cache) is not DynamicCache or cache.get_seq_length() > 0,
            "return_dict_in_generate": config is not None and config.return_dict_in_generate,
            ", ".join(sorted(others)): bool(others),
            "positions of your own": places is not None and places.flatten().tolist() != [*range(input_ids.shape[1])],
            "synced_gpus": kwargs.get("synced_gpus"),
            "RoPE that depends on the length": any(
                each.get("rope_type", each.get("type")) in _LENGTH_DEPENDENT for each in ropes
            ),
        }
        return next((why for why, holds in reasons.items() if holds), None)
