"""Unlabelled images to an encoder: one training loop, one module per self-supervised paper."""

from unpoison.callable_package import make_callable

make_callable(__name__, "unpoison.pretrain.loop:pretrain")
