"""The layer's stages as Triton kernels that read experts where they lie, through a table of slots.

Letters: T tokens, A active experts per token, R = T*A routed pairs, E experts, S slots, D model dim, F ffn dim; M, N
and K are those of one product. Up to four tokens are computed by `rows`; more are grouped by expert (`schedule`,
`grouped`); `combine` sums each token's rows. Every stage has a readable twin of the same name in `twins`.
"""
