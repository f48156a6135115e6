"""ExPO (Zheng et al., arXiv 2404.16792): beyond an aligned model, away from the one that its training started from.

::

    arithmetic.py   θ₁ + α(θ₁ − θ₀) of one weight
    source.py       the two models, their configs, and the files that are copied
    whole.py        whole models, tensor by tensor
    adapters.py     LoRA, exactly
    finding.py      which of these two given models need
"""
