"""The sizes of a Qwen2.5-VL: its config, and how many operations its work takes. Needs torch and transformers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import transformers


@dataclass(frozen=True)
class Shape:
    """Sizes of the language model and of the vision tower; by default those of Qwen2.5-VL-3B."""

    width: int = 2048
    layers: int = 36
    inner: int = 11008
    heads: int = 16
    kv_heads: int = 2
    vocabulary: int = 151_936
    vision_width: int = 1280
    vision_layers: int = 32
    vision_inner: int = 3420
    vision_heads: int = 16
    full_layers: tuple[int, ...] = (7, 15, 23, 31)  # of the vision tower; the others look at 64 patches at a time
    side: int = 224  # of an image, in pixels

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.side // 14) ** 2

    @property
    def tokens(self) -> int:
        """Merged tokens of an image."""
        return self.patches // 4

    @property
    def language_weights(self) -> int:
        """Weights of the language model's linear layers."""
        kv_width = self.width * self.kv_heads // self.heads
        return self.layers * (2 * self.width**2 + 2 * self.width * kv_width + 3 * self.width * self.inner)

    @property
    def vision_weights(self) -> int:
        """Weights of the vision tower's linear layers, without patches and merger."""
        return self.vision_layers * (4 * self.vision_width**2 + 3 * self.vision_width * self.vision_inner)

    def language_operations(self, own: int, prefix: int) -> float:
        """Operations of a prompt with `own` tokens behind a shared prefix."""
        seen = own * prefix + own * (own + 1) / 2
        return 2 * self.language_weights * own + 4 * self.width * self.layers * seen

    def vision_operations(self, tokens: int) -> float:
        """Operations of the vision tower for an image of so many merged tokens."""
        patches, full = 4 * tokens, len(self.full_layers)
        seen = full * patches**2 + (self.vision_layers - full) * patches * 64
        merger = tokens * 4 * self.vision_width * (4 * self.vision_width + self.width)
        return 2 * self.vision_weights * patches + 4 * self.vision_width * seen + 2 * merger

    def config(self, ids: Mapping[str, int | None]) -> transformers.Qwen2_5_VLConfig:
        """Return the model's config.

        Args:
            ids: of `eos`, `pad`, `image`, `video`, `vision_start` and `vision_end`.
        """
        head = self.width // self.heads
        return transformers.Qwen2_5_VLConfig(
            text_config={
                "vocab_size": self.vocabulary,
                "hidden_size": self.width,
                "intermediate_size": self.inner,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e6,
                    "mrope_section": [head // 8, 3 * head // 16, 3 * head // 16],
                },
                "bos_token_id": None,
                "eos_token_id": ids["eos"],
                "pad_token_id": ids["pad"],
            },
            vision_config={
                "depth": self.vision_layers,
                "hidden_size": self.vision_width,
                "intermediate_size": self.vision_inner,
                "num_heads": self.vision_heads,
                "out_hidden_size": self.width,
                "window_size": 112,
                "fullatt_block_indexes": list(self.full_layers),
            },
            tie_word_embeddings=True,
            **{f"{name}_token_id": ids[name] for name in ("image", "video", "vision_start", "vision_end")},
        )
