import sys; sys.exit("The machine is needed for the merged run: everything committed on your branch is merged. Write your final report now; run nothing more.")
