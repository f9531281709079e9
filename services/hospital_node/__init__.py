"""The hospital node: data, training, policy, ledger and one upload a round."""

import os

# numpy's own products are small here, and OpenBLAS lets its idle threads spin after each: at a linear head they took
# more processor time than all the rest of a round. It reads this when numpy is first imported; torch's threads are
# what the configuration says (`threads`).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
