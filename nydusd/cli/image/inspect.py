"""`nydus-image inspect BOOTSTRAP [-R REQUEST]`: ask about an image's metadata, once or in a dialogue."""

from __future__ import annotations

import argparse
import os
import sys

from nydusd.cli.image.blobs import add_bootstrap, add_config, bootstrap_path
from nydusd.cli.image.verb import Verb
from nydusd.image.inspect import Leave, Session, answer
from nydusd.image.reader import load_metadata


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bootstrap(parser)
    add_config(parser)
    parser.add_argument("-R", "--request", metavar="REQUEST", help="one command; stats, blobs and prefetch give JSON")


def run(args: argparse.Namespace) -> None:
    _, bootstrap = load_metadata(bootstrap_path(args))
    if args.request is not None:
        for text in Session(bootstrap, request=True).execute(os.fsencode(args.request)):
            print(text)
        return
    session = Session(bootstrap)
    try:
        while True:
            print(f"{session.place} :> ", end="", flush=True)
            line = sys.stdin.buffer.readline()
            if not line:
                print()
                return
            for text in answer(session, line):
                print(text)
    except Leave:
        return


VERB = Verb("inspect", "look into an image's metadata", add_arguments, run)
