"""Fast versions of the concepts in moe_reference: same names, same signatures, same results.

| module | what it holds |
|---|---|
| `gating`, `load_balancing`, `alignment`, `dispatch`, `experts`, `layer` | the functions |
| `expert_parallel` | the same for experts that are spread over the ranks of a process group |
| `quantized_experts`, `quantized_layout` | the same for packed weights, and their layout |
| `quantized_loading` | `load_prepared_experts`: read and laid out, once |
| `modules` | the layer as a module, and `optimize`, which turns the layers of a model |
| `transformers_experts` | `use_fast_experts`, for a model of Hugging Face transformers |
| `operators`, `quantized_operators` | the functions as operators of torch, for `torch.compile` |
| `targets` | the functions as targets of the conformance suite |
| `interpreter` | whether there is Triton and a GPU, and what that changes |

A function stands there three times: under its own name, which takes the fastest way on the tensors'
device; with the suffix `_torch`, in whole-tensor operations; and with the suffix `_triton`, in
kernels. `drop_to_capacity` is in torch alone.

What they are made of:

| module | what it holds |
|---|---|
| `autograd` | backward passes that are written out, and refuse their own gradient |
| `compiling` | functions that the compiler of torch does not look into |
| `activations`, `scores` | the activations of experts, the scores of routers |
| `router` | the product in front of the routing |
| `gating_backward`, `load_balancing_kernels` | kernels of the concept before the underscore |
| `experts_cpu`, `experts_torch`, `experts_triton`, `experts_backward` | ways to compute experts |
| `experts_decode` | another one, for a few tokens |
| `expert_parallel_order`, `expert_parallel_pipeline` | who sends what where, and when |
| `quantized_kernels`, `quantized_dequantize` | kernels that read packed weights |
"""
