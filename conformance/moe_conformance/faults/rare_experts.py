"""Faults of experts that show on few inputs only."""

from __future__ import annotations

import torch

from moe_conformance.faults.rare import (
    first_row_scaled,
    last_column_zero,
    last_row_zero,
    rare,
    tokens,
    top_k,
)

rare(
    "experts",
    "below-16-tokens-in-float16",
    "fewer than 16 tokens of float16",
    lambda a: tokens(a) < 16 and a["x"].dtype is torch.float16,
    first_row_scaled,
    "EXPERT-01",
    "EXPERT-02",
    "EXPERT-04",
    "EXPERT-05",
    thread="aiter #4041",
)

rare(
    "experts",
    "beyond-64-tokens",
    "more than 64 tokens",
    lambda a: tokens(a) > 64,
    last_row_zero,
    "EXPERT-01",
    "EXPERT-02",
    "EXPERT-03",
    "EXPERT-04",
    thread="aiter #4451",
)

rare(
    "experts",
    "at-k-5",
    "five experts per token",
    lambda a: top_k(a) == 5,
    first_row_scaled,
    "EXPERT-01",
    "EXPERT-03",
    "EXPERT-04",
    "EXPERT-05",
)

rare(
    "experts",
    "at-hidden-size-1",
    "a hidden size of 1",
    lambda a: a["x"].shape[1] == 1,
    first_row_scaled,
    "EXPERT-01",
    "EXPERT-02",
    "EXPERT-03",
    "EXPERT-04",
)

rare(
    "experts",
    "at-hidden-size-32",
    "a hidden size of 32",
    lambda a: a["x"].shape[1] == 32,
    last_column_zero,
    "EXPERT-01",
    "EXPERT-03",
    "EXPERT-05",
    "EXPERT-06",
    thread="triton #10190",
)

rare(
    "experts",
    "at-intermediate-size-1",
    "an intermediate size of 1",
    lambda a: a["experts"].down.shape[2] == 1,
    last_row_zero,
    "EXPERT-01",
    "EXPERT-02",
    "EXPERT-03",
    "EXPERT-04",
)

rare(
    "experts",
    "at-intermediate-size-17",
    "one over a tile of intermediate size 16",
    lambda a: a["experts"].down.shape[2] == 17,
    first_row_scaled,
    "EXPERT-01",
    "EXPERT-02",
    "EXPERT-03",
    "EXPERT-04",
    thread="vLLM #48173",
)

rare(
    "experts",
    "with-one-expert",
    "a single expert",
    lambda a: len(a["experts"].down) == 1,
    last_row_zero,
    "EXPERT-01",
    "EXPERT-02",
    "EXPERT-03",
    "EXPERT-04",
)

rare(
    "experts",
    "with-relu2",
    "relu2 and no gate",
    lambda a: a["config"].activation == "relu2" and not a["config"].gated,
    first_row_scaled,
    "EXPERT-03",
    "EXPERT-05",
    "EXPERT-06",
    "EXPERT-07",
)

rare(
    "experts",
    "with-gelu-tanh-in-bfloat16",
    "gelu_tanh in bfloat16",
    lambda a: a["config"].activation == "gelu_tanh" and a["x"].dtype is torch.bfloat16,
    first_row_scaled,
    "EXPERT-02",
    "EXPERT-05",
    "EXPERT-06",
    "EXPERT-07",
    thread="vLLM #56839",
)

rare(
    "experts",
    "with-relu-and-weighted-input",
    "relu and weights on the input",
    lambda a: a["config"].activation == "relu" and a["config"].weight_on == "input",
    first_row_scaled,
    "EXPERT-05",
    "EXPERT-06",
    "EXPERT-07",
    "EXPERT-08",
)

rare(
    "experts",
    "with-swigluoai-in-float16",
    "swigluoai in float16",
    lambda a: a["config"].activation == "swigluoai" and a["x"].dtype is torch.float16,
    first_row_scaled,
    "EXPERT-05",
    "EXPERT-06",
    "EXPERT-07",
    "EXPERT-08",
    thread="SGLang #23776",
)

rare(
    "experts",
    "at-16-tokens",
    "exactly 16 tokens",
    lambda a: tokens(a) == 16,
    last_row_zero,
    "EXPERT-01",
    "EXPERT-02",
    "EXPERT-03",
    "EXPERT-04",
)

rare(
    "experts",
    "at-65-tokens",
    "one token more than a tile",
    lambda a: tokens(a) == 65,
    last_row_zero,
    "EXPERT-01",
    "EXPERT-03",
    "EXPERT-04",
    "EXPERT-05",
    thread="aiter #4041",
)

rare(
    "experts",
    "with-a-map-of-one-expert",
    "an expert map that keeps one expert",
    lambda a: a.get("expert_map") is not None and int((a["expert_map"] >= 0).sum()) == 1,
    first_row_scaled,
    "EXPERT-08",
    thread="flashinfer #1469",
)

rare(
    "experts",
    "with-strides-in-float16",
    "a transposed x of float16",
    lambda a: not a["x"].is_contiguous() and a["x"].dtype is torch.float16,
    last_column_zero,
    "EXPERT-01",
    "EXPERT-02",
    "EXPERT-04",
    "EXPERT-05",
)

rare(
    "experts",
    "at-k-1-in-bfloat16",
    "one expert per token in bfloat16",
    lambda a: top_k(a) == 1 and a["x"].dtype is torch.bfloat16,
    first_row_scaled,
    "EXPERT-01",
    "EXPERT-02",
    "EXPERT-04",
    "EXPERT-05",
)

rare(
    "experts",
    "with-7-experts",
    "seven experts",
    lambda a: len(a["experts"].down) == 7,
    last_row_zero,
    "EXPERT-01",
    "EXPERT-02",
    "EXPERT-03",
    "EXPERT-04",
    thread="moe-ops permute",
)

rare(
    "experts_batched",
    "with-one-row",
    "batches of one row",
    lambda a: a["x"].shape[1] == 1,
    first_row_scaled,
    "EXPERT-15",
)

rare(
    "experts_batched",
    "with-one-expert",
    "a single expert",
    lambda a: len(a["x"]) == 1,
    last_row_zero,
    "EXPERT-15",
)

rare(
    "experts_batched",
    "in-float16-with-biases",
    "biases in float16",
    lambda a: a["x"].dtype is torch.float16 and a["experts"].down_bias is not None,
    first_row_scaled,
    "EXPERT-15",
)

rare(
    "experts_batched",
    "with-relu2",
    "relu2",
    lambda a: a["config"].activation == "relu2",
    first_row_scaled,
    "EXPERT-15",
)

rare(
    "experts_batched",
    "at-hidden-size-1",
    "a hidden size of 1",
    lambda a: a["x"].shape[2] == 1,
    last_row_zero,
    "EXPERT-15",
)

rare(
    "experts_batched",
    "with-swiglu-limit",
    "swiglu_limit",
    lambda a: a["config"].activation == "swiglu_limit",
    first_row_scaled,
    "EXPERT-15",
    thread="SGLang #23776",
)
