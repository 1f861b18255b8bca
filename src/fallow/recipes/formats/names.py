"""Names of layers in other trainers' files, and diffusers' for the same.

kohya writes a layer's name with underscores for dots. Which of them were dots follows from the words that names are
made of; `dotted` finds the one way of reading a name as such words, with the longest words first.

The original Stable Diffusion 1, 2 and XL networks (`input_blocks.4.1`) have two residual layers to a block, from which
diffusers' names follow by arithmetic, and the way back. FLUX and Stable Diffusion 3: see `fused`.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_SPACED = (
    "conv_in conv_out conv_norm_out time_embedding add_embedding class_embedding linear_1 linear_2 cond_proj "
    "down_blocks up_blocks mid_block resnets attentions motion_modules temp_attentions temp_convs downsamplers "
    "upsamplers transformer_blocks temporal_transformer_blocks transformer_in attn1 attn2 attn to_q to_k to_v "
    "to_out ff net proj proj_in proj_out norm norm1 norm2 norm3 conv conv1 conv2 conv3 conv4 conv_shortcut "
    "time_emb_proj encoder_hid_proj image_projection_layers single_transformer_blocks x_embedder context_embedder "
    "time_text_embed timestep_embedder guidance_embedder text_embedder norm1_context norm2_context ff_context "
    "linear linear_in linear_out add_q_proj add_k_proj add_v_proj to_add_out proj_mlp norm_out norm_q norm_k "
    "norm_added_q norm_added_k pos_embed adaln_single emb caption_projection patch_embed text_model encoder layers "
    "embeddings token_embedding position_embedding self_attn q_proj k_proj v_proj out_proj layer_norm1 layer_norm2 "
    "mlp fc1 fc2 final_layer_norm text_projection block layer SelfAttention q k v o DenseReluDense wi_0 wi_1 wi wo "
    "layer_norm relative_attention_bias shared input_blocks output_blocks middle_block in_layers out_layers "
    "emb_layers skip_connection op time_embed label_emb out double_blocks single_blocks img_attn txt_attn qkv "
    "img_mlp txt_mlp img_mod txt_mod lin linear1 linear2 modulation img_in txt_in time_in vector_in guidance_in "
    "in_layer out_layer final_layer adaLN_modulation query_norm key_norm joint_blocks x_block context_block "
    "t_embedder y_embedder "
)
_WORDS = frozenset(tuple(word.split("_")) for word in _SPACED.split())
_LONGEST = max(len(word) for word in _WORDS)


def dotted(flat: str, known: Collection[str] = ()) -> str | None:
    """`down_blocks.0.attn1.to_q` of `down_blocks_0_attn1_to_q`; None where it is made of unknown words.

    `known`: names of the layers of a network, of which the one that flattens to this comes before all reading.
    """
    for name in known:
        if len(name) == len(flat) and name.replace(".", "_") == flat:
            return name
    words = _read(flat.split("_"))
    return None if words is None else ".".join(words)


def _read(pieces: list[str]) -> list[str] | None:
    """The name as words and numbers, the longest words first; None where that cannot be."""
    rest: list[list[str] | None] = [None] * len(pieces) + [[]]  # of the name from there
    for at in reversed(range(len(pieces))):
        for length in range(min(_LONGEST, len(pieces) - at), 0, -1):
            word, behind = tuple(pieces[at : at + length]), rest[at + length]
            if behind is not None and (word in _WORDS or (length == 1 and word[0].isdecimal())):
                rest[at] = ["_".join(word), *behind]
                break
    return rest[0]


# -- Stable Diffusion 1, 2 and XL --------------------------------------------------------------------------------------

LDM = ("input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out")
RESNETS = 2  # to a block
_OUTER = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_INNER = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTER_BACK = {new: old for old, new in _OUTER.items()}
_INNER_BACK = {new: old for old, new in _INNER.items()}
_PLACE = re.compile(r"(input_blocks|output_blocks)\.(\d+)\.(\d+)\.(.+)|middle_block\.([012])\.(.+)")
_PLACE_BACK = re.compile(
    r"(down_blocks|up_blocks|mid_block)(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)


def is_ldm(layer: str) -> bool:
    """Whether a dotted layer name is the original network's."""
    return layer.split(".", 1)[0] in LDM


def from_ldm(layer: str) -> str | None:
    """diffusers' name of a layer of the original UNet; None where it is none."""
    if layer in _OUTER:
        return _OUTER[layer]
    found = _PLACE.fullmatch(layer)
    if not found:
        return None
    side, number, inner, rest, middle, middle_rest = found.groups()
    if middle is not None:
        if middle == "1":
            return f"mid_block.attentions.0.{middle_rest}"
        return _resnet(f"mid_block.resnets.{int(middle) // 2}", middle_rest)
    if side == "input_blocks":
        block, layer_of_block = divmod(int(number) - 1, RESNETS + 1)
        side = "down_blocks"
    else:
        block, layer_of_block = divmod(int(number), RESNETS + 1)
        side = "up_blocks"
    if rest == "op":
        return f"{side}.{block}.downsamplers.0.conv"
    if rest == "conv":  # behind the attention where there is one
        return f"{side}.{block}.upsamplers.0.conv"
    if inner == "1":
        return f"{side}.{block}.attentions.{layer_of_block}.{rest}"
    return _resnet(f"{side}.{block}.resnets.{layer_of_block}", rest)


def _resnet(place: str, rest: str) -> str | None:
    return f"{place}.{_INNER[rest]}" if rest in _INNER else None


def to_ldm(layer: str, attended: Collection[tuple[str, int]]) -> str | None:
    """The original UNet's name of a diffusers layer; None where it has none.

    `attended`: the ("up_blocks", number) that have attentions, behind which the upsampler then stands.
    """
    if layer in _OUTER_BACK:
        return _OUTER_BACK[layer]
    found = _PLACE_BACK.fullmatch(layer)
    if not found:
        return None
    side, number, sort, at, rest = found.groups()
    if sort == "resnets":
        if rest not in _INNER_BACK:
            return None
        rest = _INNER_BACK[rest]
    if side == "mid_block":
        return f"middle_block.{1 if sort == 'attentions' else 2 * int(at)}.{rest}"
    block, inner = int(number or 0), 1 if sort == "attentions" else 0
    if side == "down_blocks":
        if sort == "downsamplers":
            return f"input_blocks.{(RESNETS + 1) * (block + 1)}.0.op"
        return f"input_blocks.{(RESNETS + 1) * block + int(at) + 1}.{inner}.{rest}"
    if sort == "upsamplers":
        behind = 2 if (side, block) in attended else 1
        return f"output_blocks.{(RESNETS + 1) * block + RESNETS}.{behind}.{rest}"
    return f"output_blocks.{(RESNETS + 1) * block + int(at)}.{inner}.{rest}"
