"""Moezoo: a mixture-of-experts model zoo for multi-task learning on JAX.

Axis letters, the same in the whole zoo (suffixes of array names, lower-case in einsum strings):

    B batch              T tokens of one example   N tokens of the whole batch (B*T)
    D model width        F hidden width            E experts
    K experts per token  C capacity per expert     S slots per expert (soft routing)
    R rank               H heads                   G groups
    J tasks              A attributes              L layers          P patches
    V vocabulary

Floors: a file imports only from floors below its own.

    1 ops   2 nn   3 backbones   4 models, tasks, data, weights   5 train   6 deploy
"""

__version__ = "0.1.0"
