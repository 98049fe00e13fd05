"""The two ways a file can disappoint us."""


class FormatError(ValueError):
    """A file is not what it claims to be. The message is one sentence naming the file and the field."""


class ConversionError(ValueError):
    """A sound file cannot be converted as asked. The message is one sentence saying why and what to do."""
