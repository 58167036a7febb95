"""`python -m hf_kvattn`: what this machine can run, and which backend each case takes."""

from .describe import describe

if __name__ == "__main__":
    print(describe())
