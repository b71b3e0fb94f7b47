import signal

# A script starts its background jobs with SIGINT ignored, and what is ignored is inherited: tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)
