"""What a call is: the public functions, the checks of their arguments, and what a call would do."""
