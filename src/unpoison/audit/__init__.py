"""Is this encoder backdoored? Every method gives the same kind of result."""

from unpoison.callable_package import make_callable

make_callable(__name__, "unpoison.audit_pipeline:audit")
