#!/usr/bin/env python3
"Availability zones that offer every named instance type, with spot prices and vCPU quotas: find_instance.py c8gn.8xlarge g5.xlarge"
import argparse
import difflib
import json
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone

try:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError, ProfileNotFound
except ImportError: sys.exit('find_instance: boto3 is missing; run: pip install boto3')

QUOTAS = {'g': 'L-DB2E81BA', 'vt': 'L-DB2E81BA', 'gr': 'L-DB2E81BA', 'p': 'L-417A185B', 'trn': 'L-2C3B7624', 'inf': 'L-1945791B', 'dl': 'L-6E869C2A',
          'f': 'L-74FC7D96', 'x': 'L-7295265B', 'hpc': 'L-F7808C92'} # on-demand vCPUs of a family, as AWS Service Quotas names them
STANDARD_QUOTA = 'L-1216C47A' # families a c d h i m r t z
DENIED = {'AuthFailure', 'UnauthorizedOperation', 'InvalidClientTokenId', 'SignatureDoesNotMatch', 'ExpiredToken', 'RequestExpired', 'OptInRequired', 'AccessDenied', 'AccessDeniedException'}


class UserError(Exception): "One line that names what is wrong and the remedy"


def quota_code(
    instance_type:str, # such as g5.xlarge
)->str: # code in Service Quotas
    "The quota that an instance type counts against"
    family = instance_type.split('.')[0].split('-')[0]
    letters = family[:next((i for i, letter in enumerate(family) if letter.isdigit()), len(family))]
    return QUOTAS.get(letters, STANDARD_QUOTA)


def client(service, region): return boto3.client(service, region_name=region, config=Config(connect_timeout=10, read_timeout=30, retries={'max_attempts': 3}))


def offerings(
    ec2, # client of a region
    types:list, # instance types
)->dict: # zone -> the types it offers
    "Which of `types` each zone of a region offers"
    zones = defaultdict(set)
    pages = ec2.get_paginator('describe_instance_type_offerings').paginate(LocationType='availability-zone', Filters=[dict(Name='instance-type', Values=types)])
    for page in pages:
        for offer in page['InstanceTypeOfferings']: zones[offer['Location']].add(offer['InstanceType'])
    return zones


def optional(call, default):
    "What `call` gives, or `default` where this account, region or API does not tell"
    try: return call()
    except (ClientError, BotoCoreError): return default


def spot_prices(
    ec2, # client of a region
    types:list, # instance types
)->dict: # (zone, type) -> USD an hour, the latest
    "Present spot prices of a region"
    history = ec2.get_paginator('describe_spot_price_history').paginate(InstanceTypes=types, ProductDescriptions=['Linux/UNIX'], StartTime=datetime.now(timezone.utc))
    rows = [row for page in history for row in page['SpotPriceHistory']]
    return {(row['AvailabilityZone'], row['InstanceType']): float(row['SpotPrice']) for row in sorted(rows, key=lambda row: row['Timestamp'])}


def vcpus(ec2, types): return {row['InstanceType']: row['VCpuInfo']['DefaultVCpus'] for row in ec2.describe_instance_types(InstanceTypes=types)['InstanceTypes']}


def exists(
    name:str, # of an instance type
)->bool: # False only where AWS says so
    "Whether there is such an instance type"
    try: vcpus(client('ec2', 'us-east-1'), [name])
    except ClientError as error: return error.response['Error']['Code'] != 'InvalidInstanceType'
    return True


def search_region(
    region:str, # its name
    types:list, # all of them must be offered in one zone
)->tuple: # rows as in --json, and the types that the region offers in any zone
    "The zones of a region that offer every type"
    ec2, quotas = client('ec2', region), client('service-quotas', region)
    zones = offerings(ec2, types)
    fitting, offered = sorted(zone for zone, found in zones.items() if found >= set(types)), set().union(*zones.values())
    if not fitting: return [], offered
    prices, sizes = optional(lambda: spot_prices(ec2, types), {}), optional(lambda: vcpus(ec2, types), {})
    limits = {code: optional(lambda: quotas.get_service_quota(ServiceCode='ec2', QuotaCode=code)['Quota']['Value'], None) for code in set(map(quota_code, types))}
    return [dict(region=region, zone=zone, spot_usd_per_hour={name: prices.get((zone, name)) for name in types}, vcpus={name: sizes.get(name) for name in types},
                 vcpu_quota={name: limits[quota_code(name)] for name in types}) for zone in fitting], offered


def search(
    types:list, # instance types
    regions:list=None, # names, `None` for all that the account has enabled
)->dict: # `types`, `zones` as in --json, `failed` regions with their reason; raises `UserError`
    "Zones of all regions that offer every type"
    try:
        known = {name for partition in ('aws', 'aws-us-gov', 'aws-cn') for name in boto3.Session().get_available_regions('ec2', partition)}
        regions = regions or sorted(row['RegionName'] for row in client('ec2', 'us-east-1').describe_regions()['Regions'])
    except (ClientError, BotoCoreError) as error: raise explain(error) from None
    unknown = [name for name in regions if name not in known]
    if unknown: raise UserError(f"{unknown[0]}: no such region; did you mean {', '.join(difflib.get_close_matches(unknown[0], known, 3)) or 'us-east-1'}?")
    zones, offered, failed = [], set(), {}
    with ThreadPoolExecutor(16) as pool:
        for region, future in [(region, pool.submit(search_region, region, types)) for region in regions]:
            try: found, there = future.result()
            except (ClientError, BotoCoreError) as error: failed[region] = str(explain(error))
            else: zones, offered = zones + found, offered | there
    if len(failed) == len(regions): raise UserError(next(iter(failed.values())))
    for name in types:
        if name not in offered and not exists(name): raise UserError(f'{name}: no such instance type; names look like g5.xlarge, see https://aws.amazon.com/ec2/instance-types')
    return dict(types=types, zones=zones, failed=failed)


def explain(
    error:Exception, # of boto3
)->UserError:
    "An error of AWS as one line with a remedy"
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)): return UserError('no AWS credentials; run `aws configure`, or set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY')
    if isinstance(error, ProfileNotFound): return UserError(f'{error}; `aws configure list-profiles` shows those there are')
    code = error.response['Error']['Code'] if isinstance(error, ClientError) else ''
    if code in DENIED: return UserError(f'AWS refused the credentials ({code}); they need ec2:Describe* and servicequotas:GetServiceQuota, and must not be expired')
    return UserError(f'AWS does not answer: {error}; check the network and the names of the regions')


def show(
    value:float|None, # as AWS gave it, or not
    form:str, # of `format`
)->str: # '?' where it is not known
    "A number that may be missing"
    return '?' if value is None else format(value, form)


def table(
    result:dict, # of `search`
)->str: # a line per zone, the cheapest by spot price first
    "The result for people"
    def line(row): return [row['zone']] + [f"{show(row['spot_usd_per_hour'][name], '.4f')} | {show(row['vcpus'][name], 'd')} of {show(row['vcpu_quota'][name], '.0f')}" for name in result['types']]
    cost = lambda row: sum(float('inf') if price is None else price for price in row['spot_usd_per_hour'].values())
    lines = [['zone'] + [f'{name}: spot USD/h | vCPUs of quota' for name in result['types']]] + [line(row) for row in sorted(result['zones'], key=cost)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return '\n'.join('  '.join(word.ljust(width) for word, width in zip(words, widths)).rstrip() for words in lines)


def main(
    arguments:list=None, # words of the command line, those of the process if None
)->int: # 0 found, 1 no zone offers all types, 2 wrong input or no access
    "The command"
    parser = argparse.ArgumentParser('find_instance.py', description=__doc__, epilog='Exit code: 0 found, 1 no zone offers all types, 2 wrong input or no access.')
    parser.add_argument('types', nargs='+', metavar='TYPE', help='instance type, such as g5.xlarge')
    parser.add_argument('--regions', nargs='+', metavar='REGION', help='search these only, not all that the account has enabled')
    parser.add_argument('--json', action='store_true', help='print {types, zones: [{region, zone, spot_usd_per_hour, vcpus, vcpu_quota}], failed}')
    a = parser.parse_intermixed_args(arguments)
    try: result = search(list(dict.fromkeys(a.types)), a.regions)
    except UserError as error:
        print(f'find_instance: {error}', file=sys.stderr)
        return 2
    for region, reason in result['failed'].items(): print(f'find_instance: {region} left out: {reason}', file=sys.stderr)
    if a.json: print(json.dumps(result, indent=2))
    elif result['zones']: print(table(result))
    else: print(f"no zone offers all of {', '.join(result['types'])}", file=sys.stderr)
    return 0 if result['zones'] else 1


if __name__ == '__main__': sys.exit(main())
