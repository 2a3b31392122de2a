"""Every exception CacheFlow raises on purpose.

::

    CacheFlowError
    ├── ConfigError          a value given at the door is wrong: names the key, the value and what is allowed
    │   ├── UnsupportedModelError   the model's family, attention or dtype is not on the allow-list
    │   ├── ProfileError            a cost profile is malformed, or of another model, device or dtype
    │   ├── UnknownPolicyError      lists the known policies
    │   └── TraceError              a request trace is malformed: names the file, the line, the field, what is expected
    ├── CostRangeError       a cost was asked for outside the measured range
    ├── PromptError          a prompt that cannot be served: empty, negative ids, too long
    ├── StoreError           a store cannot be opened or written at all (never a single failed read)
    ├── SelfTestError        the engine cannot reproduce the model's own forward bit for bit (or within tolerance)
    └── RestoreCancelled     the caller cancelled a restoration that was under way

A single read that is missing, corrupt, late or failing is no exception: it is a ``LoadOutcome`` and becomes
recomputation.
"""


class CacheFlowError(Exception):
    """Base of every exception CacheFlow raises on purpose."""


class ConfigError(CacheFlowError, ValueError):
    """A configuration value is wrong; the message names the key, the value and what is allowed."""


class UnsupportedModelError(ConfigError):
    """The model's family, attention arguments or dtype cannot be reproduced exactly."""


class ProfileError(ConfigError):
    """A cost profile is malformed or was measured for another model, device or dtype."""


class UnknownPolicyError(ConfigError):
    """The policy name is not known; the message lists the known ones."""


class TraceError(ConfigError):
    """A request trace is malformed; the message names the file, the line, the field and what is expected."""


class CostRangeError(CacheFlowError, ValueError):
    """A cost was asked for outside the range that was measured."""


class PromptError(CacheFlowError, ValueError):
    """A prompt cannot be served: empty, out-of-vocabulary ids, or longer than the model allows."""


class StoreError(CacheFlowError, OSError):
    """A store cannot be opened, is not writable, or holds another record version."""


class SelfTestError(CacheFlowError, RuntimeError):
    """The engine could not reproduce the model's own forward pass and refuses to serve it."""


class RestoreCancelled(CacheFlowError):
    """The caller cancelled a restoration; nothing of it is still running, unless a store hangs."""
