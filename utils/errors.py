"""The two errors a user can meet; everything else is a bug."""


class UserError(Exception):
    """Bad input or a missing file: the message names the flag, file or row and the remedy."""


class PrivacyError(UserError):
    """A privacy promise would be broken; the run stops instead of releasing anything."""
