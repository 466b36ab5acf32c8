#!/usr/bin/env python
"""Trains and evaluates detectors: ``python train_net.py --config-file configs/....yaml``."""

from libra_d2.quiet import silence_known_warnings

silence_known_warnings()

from libra_d2.engine import main

if __name__ == "__main__":
    main()
