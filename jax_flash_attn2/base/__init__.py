"""What every room may use: the words of a call (`spec`), checks of arguments and their messages, dropout's numbers."""
