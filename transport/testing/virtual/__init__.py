"""Drivers under a virtual loop and clock: every order of steps, up to bounds, and random ones.

choices     a scheduler's choices: all, random, shrunk to a command line
world       virtual threads, actors, and a clock; one step at a time
threads     `threading` for a module whose threads are to be virtual
loop        an asyncio event loop in a virtual world
drivers     programs with such a loop, run once: any driver
network     its sockets: whose they are, and short reads and writes
backend     a backend whose work is done in steps
rules       what a provider's driver must keep to
program     a provider's program and its peers

The first five know nothing of namespaces: a driver of another kind brings its own rules.
"""
