from setuptools import find_packages, setup

setup(packages=find_packages(include=["copd", "copd.*", "copd_kernels", "copd_kernels.*"]))
