"""The key-share pod: custody of round keys, and sums of mask streams over one certified cohort."""
