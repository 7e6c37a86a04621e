"""The command line: parse, build a config, call the library, render, return an exit code. Nothing is decided here."""
