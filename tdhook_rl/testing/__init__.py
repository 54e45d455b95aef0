"""The conformance kit: whether a method, or a policy, of anybody's keeps what the library promises.

Knows methods by what they declare, as somebody else's are known; of the library's only what others are composed with.

In the manner of scikit-learn's ``check_estimator``. The library's own methods are tested by it.
"""

from tdhook_rl.testing.conformance import CHECKS, check_method, parametrize_with_checks
from tdhook_rl.testing.policies import check_hooked_policy
from tdhook_rl.testing.subject import SITES, sample_data, sample_policy

__all__ = [
    "CHECKS",
    "SITES",
    "check_hooked_policy",
    "check_method",
    "parametrize_with_checks",
    "sample_data",
    "sample_policy",
]
