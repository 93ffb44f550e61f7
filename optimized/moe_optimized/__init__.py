"""Fast versions of the concepts in moe_reference: same names, same signatures, same results.

`gating`, `alignment`, `dispatch`, `experts` and `layer` each hold an operation three times: under
its own name, which takes the fastest way on the tensors' device; with the suffix `_torch`, in
whole-tensor operations; and with the suffix `_triton`, in kernels.
"""
